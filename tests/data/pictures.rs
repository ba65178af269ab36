use std::fs;
use std::path::{Path, PathBuf};

use ddil_data::{CaptionedImage, Error, read_captions, read_cropped, read_image_folder};

use crate::TestResult;

/// What `tools/record/record_pictures.py` wrote.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/pictures").join(name)
}

/// The difference of two images of one size, in steps of 1/255.
fn differ(left: &Path, right: &Path, channels: i64) -> Result<f64, Error> {
    let size = read_cropped(right, channels, [1, 1])?.original_size;
    let [left, right] = [left, right].map(|path| read_cropped(path, channels, size));
    let (left, right) = (left?, right?);
    assert_eq!((left.original_size, left.crop_offset), (size, [0, 0]));
    Ok(127.5 * (left.pixels - right.pixels).abs().max().double_value(&[]))
}

#[test]
fn jpegs_are_read_as_pillow_reads_them() -> TestResult {
    let turned = (1..=8).map(|orientation| format!("turned_{orientation}"));
    let others = ["grey", "progressive", "half_width", "half_size"].map(str::to_owned);
    for name in turned.chain(others) {
        let channels = if name == "grey" { 1 } else { 3 };
        let [jpeg, png] = ["jpg", "png"].map(|end| golden(&format!("{name}.{end}")));
        assert_eq!(differ(&jpeg, &png, channels)?, 0.0, "{name}");
    }
    // A grey one in colour is three times the same.
    assert_eq!(differ(&golden("grey.jpg"), &golden("grey.png"), 3)?, 0.0);
    Ok(())
}

#[test]
fn incomplete_jpegs_are_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let refused = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("the folder can be written");
        read_cropped(&path, 3, [8, 8]).expect_err("it is damaged")
    };
    for name in ["turned_1.jpg", "grey.jpg", "progressive.jpg"] {
        let whole = fs::read(golden(name))?;
        for kept in [1, 20, whole.len() / 2, whole.len() * 4 / 5, whole.len() - 40] {
            let error = refused("cut.jpg", &whole[..kept]);
            assert!(matches!(error, Error::Jpeg { .. }), "{name}, {kept} bytes: {error:?}");
        }
    }
    let error = refused("other.JPEG", &fs::read(golden("grey.png"))?);
    assert!(error.to_string().ends_with("other.JPEG as a JPEG"), "{error}");
    let error = read_cropped(&golden("cmyk.jpg"), 3, [8, 8]).expect_err("it is of inks");
    assert!(error.to_string().contains("expected grey or RGB"), "{error}");
    let error = read_cropped(&golden("turned_1.jpg"), 1, [8, 8]).expect_err("it has colours");
    assert!(error.to_string().contains("RGB, 24x16 pixels; expected grey"), "{error}");
    Ok(())
}

#[test]
fn a_folder_of_images_can_have_both_formats() -> TestResult {
    let folder = tempfile::tempdir()?;
    for (from, to) in [("turned_6.jpg", "a.jpg"), ("turned_1.png", "b.png")] {
        fs::copy(golden(from), folder.path().join(to))?;
    }
    let images = read_image_folder(folder.path())?;
    assert_eq!((images.len(), images.image_shape()), (2, [3, 16, 24]));
    Ok(())
}

/// A folder with two images and text files of this content.
fn captioned(files: &[(&str, &str)]) -> std::io::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    fs::copy(golden("grey.png"), folder.path().join("a.png"))?;
    fs::create_dir(folder.path().join("more"))?;
    fs::copy(golden("grey.jpg"), folder.path().join("more/b.jpg"))?;
    for (name, text) in files {
        fs::write(folder.path().join(name), text)?;
    }
    Ok(folder)
}

fn sample(file: &str, text: &str) -> CaptionedImage {
    CaptionedImage { file_name: file.into(), texts: vec![text.to_owned()] }
}

#[test]
fn a_table_of_captions_is_read_with_its_quotes() -> TestResult {
    let text = "\u{feff}width,text,file_name\r\n8,\"a \"\"red\"\" cat, sitting\non a chair\",more/b.jpg\r\n8,a dog,a.png\r\n";
    let folder = captioned(&[("metadata.csv", text)])?;
    let expected =
        [sample("more/b.jpg", "a \"red\" cat, sitting\non a chair"), sample("a.png", "a dog")];
    assert_eq!(read_captions(folder.path())?, expected);
    Ok(())
}

#[test]
fn a_table_that_cannot_be_read_says_where() -> TestResult {
    let refused = |files: &[(&str, &str)]| -> Result<String, Box<dyn std::error::Error>> {
        let folder = captioned(files)?;
        Ok(read_captions(folder.path()).expect_err("it cannot be read").to_string())
    };
    let rows = "file_name,text\na.png,\"a cat\non two lines\"\nabsent.png,a dog\na.png,again\n../a.png,x\na.png\n";
    let message = refused(&[("metadata.csv", rows)])?;
    for words in [
        "metadata.csv:4: absent.png does not exist or does not end in .png, .jpg or .jpeg",
        "metadata.csv:5: a.png is listed twice",
        "metadata.csv:6: ../a.png is not inside the folder",
        "metadata.csv:7: ",
    ] {
        assert!(message.contains(words), "{words}: {message}");
    }
    let message = refused(&[("metadata.csv", "file_name,caption\na.png,a cat\n")])?;
    assert!(message.contains("no column `text`; the columns are file_name, caption"), "{message}");
    let message = refused(&[("metadata.csv", ""), ("metadata.jsonl", "")])?;
    assert!(message.contains("both metadata.jsonl and metadata.csv"), "{message}");
    let folder = captioned(&[("metadata.csv", "file_name,text\n")])?;
    assert!(matches!(read_captions(folder.path()), Err(Error::NoImages { .. })));
    Ok(())
}
