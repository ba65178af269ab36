use std::path::PathBuf;

use ddil_libtorch::{Error, MappedFile};
use tch::{Kind, Tensor};
use tempfile::TempDir;

use crate::TestResult;

/// A file of the doubles 0, 1, 2, .. and the folder that goes with it.
fn counting(len: u8) -> Result<(TempDir, PathBuf), std::io::Error> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("numbers");
    let numbers: Vec<u8> = (0..len).flat_map(|n| f64::from(n).to_ne_bytes()).collect();
    std::fs::write(&path, numbers)?;
    Ok((folder, path))
}

#[test]
fn tensors_are_where_the_bytes_are() -> TestResult {
    let (_folder, path) = counting(8)?;
    let file = MappedFile::open(&path)?;
    assert_eq!((file.path(), file.bytes().len()), (path.as_path(), 64));
    let tensor = file.tensor(16, [2, 3], Kind::Double)?;
    assert_eq!(tensor, Tensor::arange_start(2, 8, (Kind::Double, tch::Device::Cpu)).view([2, 3]));
    assert_eq!(file.tensor(64, [0], Kind::Double)?.numel(), 0);
    assert_eq!(file.tensor(8, [0_i64; 0], Kind::Double)?.double_value(&[]), 1.0);
    // No copy: a second tensor over the same bytes contains what is written to the first.
    let _ = tensor.shallow_clone().fill_(-1.0);
    assert_eq!(file.tensor(40, [1], Kind::Double)?.double_value(&[0]), -1.0);
    Ok(())
}

#[test]
fn writing_to_a_tensor_leaves_the_file_alone() -> TestResult {
    let (_folder, path) = counting(4)?;
    let before = std::fs::read(&path)?;
    let file = MappedFile::open(&path)?;
    let mut tensor = file.tensor(0, [4], Kind::Double)?;
    let _ = tensor.fill_(7.0);
    assert_eq!(tensor.sum(Kind::Double).double_value(&[]), 28.0);
    assert_eq!(std::fs::read(&path)?, before);
    assert_eq!(file.bytes(), before);
    Ok(())
}

#[test]
fn a_tensor_keeps_its_file_mapped() -> TestResult {
    let (folder, path) = counting(200)?;
    let tensor = MappedFile::open(&path)?.tensor(0, [200], Kind::Double)?;
    drop(folder);
    let last = tensor.slice(0, 199, 200, 1);
    drop(tensor);
    let last = std::thread::spawn(move || last.double_value(&[0])).join();
    assert_eq!(last.expect("the thread returns"), 199.0);
    Ok(())
}

#[test]
fn mismatches_are_refused() -> TestResult {
    let (_folder, path) = counting(4)?;
    let file = MappedFile::open(&path)?;
    for (offset, shape) in [
        (0, vec![5]),
        (8, vec![4]),
        (33, vec![0]),
        (40, vec![1]),
        (usize::MAX, vec![1]),
        (usize::MAX - 7, vec![1]),
        (0, vec![-1]),
        (0, vec![-2, -2]),
        (0, vec![i64::MAX]),
        (0, vec![1 << 32, 1 << 32]),
        (0, vec![i64::MAX, i64::MAX, 0]),
    ] {
        let result = file.tensor(offset, &shape, Kind::Double);
        assert!(matches!(result, Err(Error::OutOfBounds { len: 32, .. })), "{offset} {shape:?}");
    }
    Ok(())
}

#[test]
fn misaligned_tensors_are_refused() -> TestResult {
    let (_folder, path) = counting(4)?;
    let file = MappedFile::open(&path)?;
    for (offset, kind) in
        [(4, Kind::Double), (2, Kind::Float), (1, Kind::Half), (8, Kind::ComplexDouble)]
    {
        let result = file.tensor(offset, [1], kind);
        assert!(matches!(result, Err(Error::Misaligned { .. })), "{offset} {kind:?}");
    }
    assert_eq!(file.tensor(3, [1], Kind::Uint8)?.kind(), Kind::Uint8);
    Ok(())
}

#[test]
fn bytes_that_are_not_bools_are_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("truth");
    std::fs::write(&path, [0, 1, 1, 2])?;
    let file = MappedFile::open(&path)?;
    assert_eq!(file.tensor(0, [3], Kind::Bool)?.sum(Kind::Int64).int64_value(&[]), 2);
    let result = file.tensor(1, [3], Kind::Bool);
    assert!(matches!(result, Err(Error::NotBool { offset: 3, value: 2, .. })));
    let result = file.tensor(0, [1], Kind::QInt8);
    assert!(matches!(result, Err(Error::UnsupportedKind { kind: Kind::QInt8, .. })));
    Ok(())
}

#[test]
fn files_that_cannot_be_mapped() -> TestResult {
    let folder = tempfile::tempdir()?;
    let missing = MappedFile::open(folder.path().join("missing"));
    assert!(matches!(missing, Err(Error::Map { .. })));
    assert!(matches!(MappedFile::open(folder.path()), Err(Error::Map { .. })));

    let empty = folder.path().join("empty");
    std::fs::write(&empty, [])?;
    let file = MappedFile::open(&empty)?;
    assert_eq!(file.tensor(0, [0], Kind::Float)?.numel(), 0);
    assert!(file.tensor(0, [1], Kind::Float).is_err());
    Ok(())
}

#[test]
fn pages_are_given_back_once_no_tensor_is_left() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("numbers");
    std::fs::write(&path, [1_u8, 2, 3])?;
    let mut file = MappedFile::open(&path)?;
    let tensor = file.tensor(0, [3], Kind::Uint8)?;
    let _ = tensor.shallow_clone().fill_(9);
    assert!(!file.release_pages());
    assert_eq!(Vec::<u8>::try_from(&tensor)?, [9, 9, 9]);
    let view = tensor.narrow(0, 0, 1);
    drop(tensor);
    assert!(!file.release_pages());
    drop(view);
    assert_eq!(file.release_pages(), cfg!(unix));
    assert_eq!(file.bytes(), [1, 2, 3]);
    #[cfg(target_os = "linux")]
    assert_eq!(Vec::<u8>::try_from(file.tensor(0, [3], Kind::Uint8)?)?, [1, 2, 3]);
    Ok(())
}
