use std::{fs, num::NonZeroU32};

use ddil_pipelines::{Error, Image, Layout, save_each};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

use crate::TestResult;

fn columns(columns: u32) -> Layout {
    Layout::columns(NonZeroU32::new(columns).expect("not zero"))
}

fn decode(content: &[u8]) -> Result<(png::OutputInfo, Vec<u8>), Box<dyn std::error::Error>> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(content)).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().ok_or("it fits memory")?];
    let info = reader.next_frame(&mut pixels)?;
    Ok((info, pixels))
}

#[test]
fn values_are_scaled_clamped_and_rounded() -> TestResult {
    let values = [-1.0, 1.0, 0.0, -2.0, 7.0, f32::INFINITY, 1.0 / 127.5 - 1.0, 1.49 / 127.5 - 1.0];
    let image = Tensor::from_slice(&values).view([1, 1, 2, 4]);
    let picture = &Image::each(&image)?[0];
    // 127.5 is a half, and goes to the even number.
    assert_eq!(picture.pixels(), [0, 255, 128, 0, 255, 255, 1, 1]);
    Ok(())
}

#[test]
fn every_byte_survives_the_way_there_and_back() -> TestResult {
    let bytes: Vec<u8> = (0..=255).collect();
    let image = Tensor::from_slice(&bytes).to_kind(Kind::Float) / 127.5 - 1.0;
    assert_eq!(Image::each(&image.view([1, 1, 16, 16]))?[0].pixels(), bytes);
    Ok(())
}

#[test]
fn a_grid_has_images_in_rows_with_gutters() -> TestResult {
    // Three grey images of 1x2 pixels: 0 and 51, 102 and 153, 204 and 255.
    let images = (Tensor::arange(6, FLOAT_CPU) * 51.0 / 127.5 - 1.0).view([3, 1, 1, 2]);
    let layout = Layout { gutter: 1, background: 9, ..columns(2) };
    let picture = Image::grid(&images, layout)?;
    assert_eq!((picture.width(), picture.height(), picture.channels()), (7, 5, 1));
    let rows: [[u8; 7]; 5] =
        [[9; 7], [9, 0, 51, 9, 102, 153, 9], [9; 7], [9, 204, 255, 9, 9, 9, 9], [9; 7]];
    assert_eq!(picture.pixels(), rows.as_flattened());

    let two = NonZeroU32::new(2).ok_or("not zero")?;
    let scaled = Image::grid(&images.narrow(0, 0, 1), Layout { gutter: 0, scale: two, ..layout })?;
    assert_eq!(scaled.pixels(), [0, 0, 51, 51, 0, 0, 51, 51]);
    Ok(())
}

#[test]
fn colours_go_to_the_file_pixel_by_pixel() -> TestResult {
    // Red, green, blue and white as [c, h, w] planes.
    let planes = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]];
    let images = (Tensor::from_slice(planes.as_flattened()) * 2.0 - 1.0).view([1, 3, 2, 2]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("grid.png");
    Image::grid(&images, Layout { gutter: 0, ..columns(8) })?.save(&path)?;
    let (info, pixels) = decode(&fs::read(path)?)?;
    assert_eq!((info.width, info.height, info.color_type), (2, 2, png::ColorType::Rgb));
    assert_eq!(pixels, [255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255]);
    Ok(())
}

#[test]
fn each_image_gets_a_file() -> TestResult {
    let images = (Tensor::arange(3, FLOAT_CPU) * 51.0 / 127.5 - 1.0).view([3, 1, 1, 1]);
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("a/b");
    let paths = save_each(&images.expand([3, 1, 2, 2], false).to_kind(Kind::Half), &out, 7)?;
    assert_eq!(paths, ["000007.png", "000008.png", "000009.png"].map(|name| out.join(name)));
    for (path, value) in paths.iter().zip([0, 51, 102]) {
        let (info, pixels) = decode(&fs::read(path)?)?;
        assert_eq!(info.color_type, png::ColorType::Grayscale);
        assert_eq!(pixels, [value; 4]);
    }
    Ok(())
}

#[test]
fn invalid_tensors_are_refused() {
    let nan = Tensor::full([1, 1, 2, 2], f64::NAN, FLOAT_CPU);
    for (images, found) in [
        (Tensor::zeros([1, 2, 4, 4], FLOAT_CPU), "shape [1, 2, 4, 4]"),
        (Tensor::zeros([1, 4, 4], FLOAT_CPU), "shape [1, 4, 4]"),
        (Tensor::zeros([1, 1, 0, 4], FLOAT_CPU), "shape [1, 1, 0, 4]"),
        (Tensor::zeros([0, 1, 4, 4], FLOAT_CPU), "no images"),
        (Tensor::zeros([1, 1, 4, 4], (Kind::Uint8, tch::Device::Cpu)), "kind Uint8"),
        (nan, "NaN values"),
    ] {
        let error = Image::grid(&images, columns(4)).expect_err(found);
        assert!(matches!(error, Error::Image { .. }));
        assert!(error.to_string().contains(found), "{error}");
    }
}
