//! Images of any sizes, decoded in threads.

use std::path::{Path, PathBuf};

use ddil_data::{Error, ImageFiles};
use ddil_metrics::{FeatureExtractor, ImageInput, RawPixels};
use tch::{Kind, Tensor};

type TestResult = Result<(), Box<dyn std::error::Error>>;

fn write_png(path: &Path, colour: png::ColorType, [width, height]: [u32; 2], pixels: &[u8]) {
    let file = std::fs::File::create(path).expect("the folder can be written");
    let mut png = png::Encoder::new(file, width, height);
    png.set_color(colour);
    png.write_header().and_then(|mut png| png.write_image_data(pixels)).expect("a PNG");
}

/// Thirteen grey images in three folders; the size and the value depend on the number.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for part in ["", "a", "b/c"] {
        std::fs::create_dir_all(folder.path().join(part)).expect("a folder");
    }
    for index in 0..13_u32 {
        let part = ["", "a", "b/c"][index as usize % 3];
        let size = [1 + index, 14 - index];
        let pixels = vec![index as u8; (size[0] * size[1]) as usize];
        let path = folder.path().join(part).join(format!("{index:02}.png"));
        write_png(&path, png::ColorType::Grayscale, size, &pixels);
    }
    folder
}

#[test]
fn images_come_in_the_order_of_their_paths() -> TestResult {
    let folder = folder();
    std::fs::write(folder.path().join("notes.txt"), "no image")?;
    std::fs::write(folder.path().join(".hidden.png"), "no image")?;
    let files = ImageFiles::in_folder(folder.path())?;
    assert_eq!(files.len(), 13);
    assert!(files.paths().is_sorted());
    for threads in [1, 2, 5, 100] {
        let mut found = Vec::new();
        files.for_each(threads, Ok::<_, Error>, |index, image| {
            assert_eq!(index, found.len());
            found.push(image);
            Ok(())
        })?;
        for (path, image) in files.paths().iter().zip(&found) {
            let number: i64 =
                path.file_stem().and_then(|stem| stem.to_str()).ok_or("a name")?.parse()?;
            assert_eq!(
                (image.size(), image.kind()),
                (vec![1, 1, 14 - number, 1 + number], Kind::Uint8)
            );
            assert_eq!(image.min().int64_value(&[]), number);
        }
        assert_eq!(found.len(), 13);
    }
    assert_eq!(files.skip(4).map(|rest| rest.paths().to_vec()), Some(files.paths()[4..].to_vec()));
    assert!(files.skip(13).is_none());
    Ok(())
}

#[test]
fn the_order_of_files_is_that_of_the_seed() -> TestResult {
    let folder = tempfile::tempdir()?;
    for index in 0..64 {
        std::fs::write(folder.path().join(format!("{index:02}.png")), "never read")?;
    }
    let files = ImageFiles::in_folder(folder.path())?;
    let shuffled = files.shuffled(3);
    assert_eq!(shuffled.paths(), files.shuffled(3).paths());
    assert_ne!(shuffled.paths(), files.shuffled(4).paths());
    // The order depends on the files, and not on an order before.
    let mut sorted = shuffled.paths().to_vec();
    sorted.sort();
    assert_eq!(sorted, files.paths());
    // The first quarter is not that of the folder: about a quarter of it is.
    let first = &shuffled.paths()[..16];
    let of_first = first.iter().filter(|path| files.paths()[..16].contains(path)).count();
    assert!((1..9).contains(&of_first), "{of_first}");
    Ok(())
}

#[test]
fn features_do_not_depend_on_threads_or_batches() -> TestResult {
    /// Means and a corner of resized images.
    struct Corner(ImageInput);
    impl FeatureExtractor for Corner {
        fn input(&self) -> &ImageInput {
            &self.0
        }
        fn extract(&self, prepared: &Tensor) -> ddil_metrics::Result<Tensor> {
            assert!(prepared.size()[0] <= 32);
            Ok(prepared.narrow(2, 0, 1).narrow(3, 0, 1).flatten(1, -1))
        }
        fn id(&self) -> &'static str {
            "corner"
        }
        fn dim(&self) -> i64 {
            3
        }
    }
    let folder = folder();
    for index in 0..60_u8 {
        let path = folder.path().join(format!("z{index:02}.png"));
        write_png(&path, png::ColorType::Rgb, [2, 1], &[100 + index; 6]);
    }
    let files = ImageFiles::in_folder(folder.path())?;
    let extractor = Corner(ImageInput::pytorch_fid());
    let features = |files: &ImageFiles, threads| -> Result<Tensor, Error> {
        let mut batches = Vec::new();
        files.features(&extractor, threads, |batch| {
            batches.push(batch.shallow_clone());
            Ok::<_, Error>(())
        })?;
        Ok(Tensor::cat(&batches, 0))
    };
    let whole = features(&files, 1)?;
    assert_eq!(whole.size(), [73, 3]);
    let level = |row: i64| (whole.double_value(&[row, 1]) + 1.0) * 127.5;
    assert!((level(72) - 159.0).abs() < 1e-3, "{}", level(72));
    assert_eq!(features(&files, 7)?, whole);
    let rest = files.skip(40).ok_or("there are more")?;
    assert_eq!(features(&rest, 3)?, whole.narrow(0, 40, 33));
    Ok(())
}

#[test]
fn transparency_is_dropped() -> TestResult {
    let folder = tempfile::tempdir()?;
    write_png(
        &folder.path().join("a.png"),
        png::ColorType::Rgba,
        [1, 2],
        &[1, 2, 3, 0, 4, 5, 6, 9],
    );
    write_png(
        &folder.path().join("b.png"),
        png::ColorType::GrayscaleAlpha,
        [2, 1],
        &[7, 0, 8, 255],
    );
    let mut found = Vec::new();
    ImageFiles::in_folder(folder.path())?.for_each(2, Ok::<_, Error>, |_, image| {
        found.push(image);
        Ok(())
    })?;
    assert_eq!(found[0], Tensor::from_slice(&[1_u8, 4, 2, 5, 3, 6]).view([1, 3, 2, 1]));
    assert_eq!(found[1], Tensor::from_slice(&[7_u8, 8]).view([1, 1, 1, 2]));
    Ok(())
}

#[test]
fn the_first_bad_file_is_named() -> TestResult {
    let folder = folder();
    for name in ["05.png", "11.png"] {
        std::fs::write(folder.path().join("b/c").join(name), "not a PNG")?;
    }
    let files = ImageFiles::in_folder(folder.path())?;
    for threads in [1, 4, 13] {
        let mut consumed: Vec<PathBuf> = Vec::new();
        let error = files
            .for_each(threads, Ok::<_, Error>, |index, _| {
                consumed.push(files.paths()[index].clone());
                Ok(())
            })
            .expect_err("two files are damaged");
        assert!(error.to_string().contains("05.png"), "{error}");
        let before = files.paths().iter().position(|path| path.ends_with("05.png"));
        assert_eq!(Some(consumed.len()), before);
    }
    // An error of the caller ends the work too.
    let ended = files.for_each(3, Ok::<_, Error>, |index, _| match index {
        0 => Ok(()),
        _ => Err(Error::NoImages { path: "enough".into() }),
    });
    assert!(matches!(ended, Err(Error::NoImages { path }) if path == Path::new("enough")));
    Ok(())
}

#[test]
fn images_that_do_not_fit_the_extractor() -> TestResult {
    let folder = folder();
    let files = ImageFiles::in_folder(folder.path())?;
    let refused = |extractor: RawPixels| {
        files
            .features(&extractor, 2, |_| Ok::<_, Error>(()))
            .expect_err("the sizes differ")
            .to_string()
    };
    let text = refused(RawPixels::new([1, 14, 1]));
    assert!(text.contains("03.png") && text.contains("does not resize"), "{text}");
    let empty = tempfile::tempdir()?;
    let none = ImageFiles::in_folder(empty.path()).expect_err("no images");
    assert!(matches!(none, Error::NoImages { .. }));
    assert!(matches!(ImageFiles::in_folder(&empty.path().join("absent")), Err(Error::Read { .. })));
    Ok(())
}

/// Images are decoded by single threads, and the caller keeps its own number.
#[test]
fn the_number_of_threads_is_that_of_before() -> TestResult {
    let folder = folder();
    let files = ImageFiles::in_folder(folder.path())?;
    let counted = std::thread::spawn(move || {
        ddil_libtorch::set_num_threads(3)?;
        let mut seen = Vec::new();
        files.for_each(
            2,
            |_| Ok::<_, Error>(ddil_libtorch::num_threads()?),
            |_, own| {
                seen.push((own, ddil_libtorch::num_threads()?));
                Ok(())
            },
        )?;
        // Also for a thread that has not computed yet.
        let fresh = std::thread::spawn(ddil_libtorch::num_threads).join().expect("it returns")?;
        Ok::<_, Error>((seen, ddil_libtorch::num_threads()?, fresh))
    });
    let (seen, after, fresh) = counted.join().expect("the thread returns")?;
    assert_eq!(seen, [(1, 3); 13]);
    assert_eq!((after, fresh), (3, 3));
    Ok(())
}
