use std::path::PathBuf;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::{Error, Result, RowFile, copy_rows_, gather_rows};
use tch::{Device, Kind, Tensor, kind};
use tempfile::TempDir;

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    let path = folder.path().join("rows");
    (folder, path)
}

/// Rows of an integer and two floats, each `n`, `n + 0.25` and `n + 0.5`.
fn row(n: i32) -> Vec<u8> {
    let floats = [0.25, 0.5].map(|more: f32| (n as f32 + more).to_le_bytes()).concat();
    [&n.to_le_bytes()[..], &floats].concat()
}

#[test]
fn rows_are_gathered_into_the_requested_places() -> Result<()> {
    let (_folder, path) = place();
    let mut file = RowFile::create(&path, b"what it is", 12, 5)?;
    assert_eq!(file.len(), 10 + 5 * 12);
    file.write(3, &[row(3), row(4)].concat())?;
    file.write(0, &row(7))?;
    let mut floats = Tensor::full([4, 2], -1, kind::FLOAT_CPU);
    gather_rows(&mut floats, 4, [(&file, 3, 2), (&file, 0, 0), (&file, 4, 3)])?;
    let expected = [7.25_f32, 7.5, -1.0, -1.0, 3.25, 3.5, 4.25, 4.5];
    assert_eq!(Vec::<f32>::try_from(floats.view([8])).expect("floats"), expected);
    // Rows written later are visible, and rows never written are zero.
    file.write(1, &row(1))?;
    let mut integers = Tensor::zeros([2], (Kind::Int, Device::Cpu));
    gather_rows(&mut integers, 0, [(&file, 1, 0), (&file, 2, 1)])?;
    assert_eq!(Vec::<i32>::try_from(&integers).expect("integers"), [1, 0]);

    file.seal();
    assert!(matches!(file.write(2, &row(2)), Err(Error::File { action: "write", .. })));
    drop(file);
    let again = RowFile::open(&path, 10, 12, 5)?;
    gather_rows(&mut integers, 0, [(&again, 4, 0), (&again, 3, 1)])?;
    assert_eq!(Vec::<i32>::try_from(&integers).expect("integers"), [4, 3]);
    Ok(())
}

/// Its name may be removed, as that of a buffer's file whose states were evicted.
#[test]
fn rows_stay_while_they_are_mapped() -> Result<()> {
    let (_folder, path) = place();
    let mut file = RowFile::create(&path, &[], 12, 1)?;
    file.write(0, &row(5))?;
    std::fs::remove_file(&path).expect("it is there");
    let mut integers = Tensor::zeros([1], (Kind::Int, Device::Cpu));
    gather_rows(&mut integers, 0, [(&file, 0, 0)])?;
    assert_eq!(integers.int64_value(&[0]), 5);
    Ok(())
}

#[test]
fn room_is_set_aside_at_once() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let (_folder, path) = place();
    RowFile::create(&path, b"head", 1000, 1000)?;
    let metadata = std::fs::metadata(&path).expect("it is there");
    assert!(
        metadata.blocks() * 512 >= metadata.len(),
        "it has holes, which a full disk could not fill"
    );
    Ok(())
}

#[test]
fn invalid_files_are_refused() -> Result<()> {
    let (folder, path) = place();
    for (row_bytes, num_rows) in [(0, 3), (usize::MAX, 2), (1 << 40, 1 << 30)] {
        let refused = RowFile::create(&path, b"head", row_bytes, num_rows);
        assert!(
            matches!(refused, Err(Error::Argument(ArgumentError::Value { .. }))),
            "{refused:?}"
        );
    }
    let nowhere = RowFile::create(folder.path().join("no/rows"), b"head", 4, 4);
    assert!(matches!(nowhere, Err(Error::File { action: "create", .. })), "{nowhere:?}");
    drop(RowFile::create(&path, b"head", 4, 4)?);
    let twice = RowFile::create(&path, b"head", 4, 4);
    assert!(matches!(twice, Err(Error::File { action: "create", .. })), "{twice:?}");
    assert!(path.exists(), "the first one stays");
    let longer = RowFile::open(&path, 4, 4, 5);
    assert!(matches!(longer, Err(Error::FileLength { found: 20, expected: 24, .. })), "{longer:?}");
    Ok(())
}

#[test]
fn rows_beyond_the_file_or_the_tensor_are_refused() -> Result<()> {
    let (_folder, path) = place();
    let mut file = RowFile::create(&path, b"head", 12, 3)?;
    for (first, bytes) in [(0, 5), (3, 12), (2, 24), (usize::MAX, 12)] {
        let refused = file.write(first, &vec![0; bytes]);
        assert!(
            matches!(refused, Err(Error::Argument(ArgumentError::Value { .. }))),
            "{first} {bytes}"
        );
    }
    let mut floats = Tensor::zeros([2, 2], kind::FLOAT_CPU);
    for (offset, row, to) in
        [(0, 3, 0), (5, 0, 0), (usize::MAX, 0, 0), (0, 0, 2), (0, usize::MAX, 0)]
    {
        let refused = gather_rows(&mut floats, offset, [(&file, row, to)]);
        assert!(
            matches!(refused, Err(Error::Argument(ArgumentError::Value { .. }))),
            "{offset} {row} {to}"
        );
    }
    let refused = gather_rows(&mut floats.tr(), 0, [(&file, 0, 0)]);
    assert!(
        matches!(refused, Err(Error::Argument(ArgumentError::Value { name: "out", .. }))),
        "{refused:?}"
    );
    let mut scalar = Tensor::from(1.0_f32);
    assert!(gather_rows(&mut scalar, 0, [(&file, 0, 0)]).is_err());
    let mut truth = Tensor::zeros([2, 2], (Kind::Bool, Device::Cpu));
    let refused = gather_rows(&mut truth, 0, [(&file, 0, 0)]);
    assert!(matches!(refused, Err(Error::UnsupportedKind { .. })), "{refused:?}");
    Ok(())
}

#[test]
fn rows_are_copied_as_index_copy_does() -> Result<()> {
    for kind in [Kind::Half, Kind::Float, Kind::Int64, Kind::Bool] {
        let mut copied = Tensor::arange(21, kind::FLOAT_CPU).view([7, 3]).to_kind(kind);
        let given = (Tensor::arange(12, kind::FLOAT_CPU) - 5.0).view([4, 3]).to_kind(kind);
        let mut expected = copied.copy();
        let rows = [6_i64, 0, 3, 2];
        let _ = expected.index_copy_(0, &Tensor::from_slice(&rows), &given);
        copy_rows_(&mut copied, &rows.map(|row| row as usize), &given)?;
        assert_eq!(copied, expected);
        copy_rows_(&mut copied, &[], &given.narrow(0, 0, 0))?;
        assert_eq!(copied, expected);
    }
    Ok(())
}

#[test]
fn rows_that_do_not_fit_are_not_copied() {
    let mut out = Tensor::zeros([3, 2], kind::FLOAT_CPU);
    let given = Tensor::ones([2, 2], kind::FLOAT_CPU);
    let double = given.to_kind(Kind::Double);
    let wrong: [(&[usize], Tensor); 5] = [
        (&[0, 3], given.shallow_clone()),
        (&[0], given.shallow_clone()),
        (&[0, 1], double),
        (&[0, 1], Tensor::ones([2, 3], kind::FLOAT_CPU)),
        (&[0, 1], given.tr()),
    ];
    for (rows, from) in &wrong {
        let refused = copy_rows_(&mut out, rows, from);
        assert!(
            matches!(refused, Err(Error::Argument(ArgumentError::Value { .. }))),
            "{rows:?} {from:?}"
        );
    }
    assert_eq!(out.sum(Kind::Double).double_value(&[]), 0.0);
}
