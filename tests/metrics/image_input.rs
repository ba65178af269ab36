//! Images as clean-fid, pytorch-fid, torch-fidelity and CLIP convert them; `tools/record/record_image_input.py`.

use ddil_libtorch::ArgumentError;
use ddil_metrics::{Error, ImageInput, Normalization, PixelRange, Resize};
use serde_json::Value;
use tch::{Device, Kind, Tensor, kind};

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// `[height][width][channel]` in JSON as `[1, channel, height, width]`.
fn image(value: &Value) -> Tensor {
    let rows: Vec<Vec<Vec<f64>>> = serde_json::from_value(value.clone()).expect("an image");
    let shape = [rows.len() as i64, rows[0].len() as i64, rows[0][0].len() as i64];
    let flat: Vec<f64> = rows.into_iter().flatten().flatten().collect();
    Tensor::from_slice(&flat).view(shape).permute([2, 0, 1]).unsqueeze(0).contiguous()
}

fn cases_with(key: &str) -> Vec<Value> {
    let recorded: Value =
        serde_json::from_str(include_str!("../golden/metrics/image_input.json")).expect("JSON");
    let cases = recorded["cases"].as_array().expect("a list").clone();
    cases.into_iter().filter(|case| case.get(key).is_some()).collect()
}

fn input(resize: Resize, range: PixelRange) -> ImageInput {
    let mut input = ImageInput::unchanged(3);
    (input.resize, input.range) = (resize, range);
    input
}

/// The largest difference from what was recorded, from bytes and from floats in `[-1, 1]`.
fn gap(case: &Value, key: &str, input: &ImageInput) -> f64 {
    let bytes = image(&case["image"]).to_kind(Kind::Uint8);
    let floats = bytes.to_kind(Kind::Float) / 127.5 - 1.0;
    let recorded = image(&case[key]);
    let gaps = [bytes, floats].map(|images| {
        let found = input.prepare(&images).expect("an RGB image");
        assert_eq!((found.size(), found.kind()), (recorded.size(), Kind::Float));
        (found.to_kind(Kind::Double) - &recorded).abs().max().double_value(&[])
    });
    gaps[0].max(gaps[1])
}

#[test]
fn images_are_resized_as_the_tools_do() {
    let mut count = 0;
    for case in cases_with("size") {
        let size = serde_json::from_value(case["size"].clone()).expect("two numbers");
        let clean = input(Resize::Bicubic(size), PixelRange::Byte);
        let pytorch = input(Resize::Bilinear(size), PixelRange::SignedUnit);
        let tf1 = input(Resize::BilinearTf1(size), PixelRange::Byte);
        assert!(gap(&case, "clean_fid", &clean) < 2e-4, "{}", gap(&case, "clean_fid", &clean));
        assert!(gap(&case, "pytorch_fid", &pytorch) < 2e-6);
        assert!(gap(&case, "torch_fidelity", &tf1) < 2e-4);
        // The three differ from each other: a wrong choice would be seen.
        assert!(gap(&case, "clean_fid", &tf1) > 1.0 && gap(&case, "torch_fidelity", &clean) > 1.0);
        count += 1;
    }
    assert_eq!(count, 6);
}

#[test]
fn images_are_cropped_as_clip_does() {
    for case in cases_with("clip") {
        let number = |key: &str| case[key].as_i64().expect("a number");
        let crop = Resize::BicubicCrop { side: number("side"), crop: number("crop") };
        // PIL rounds to a level after each of the two directions.
        let mut input = input(crop, PixelRange::Byte);
        let found = gap(&case, "clip", &input);
        assert!(found < 1.6, "{found}");
        input.rounded = true;
        let found = gap(&case, "clip", &input);
        println!("rounded: {found}");
        assert!(found < 1e-3, "{found}");
    }
}

#[test]
fn rounded_images_have_whole_levels() -> TestResult {
    let images = Tensor::rand([1, 3, 9, 20], kind::FLOAT_CPU) * 2.0 - 1.0;
    for resize in [
        Resize::None,
        Resize::Bicubic([5, 7]),
        Resize::Bilinear([5, 7]),
        Resize::BilinearTf1([5, 7]),
        Resize::BicubicCrop { side: 6, crop: 5 },
    ] {
        let mut input = input(resize, PixelRange::Byte);
        input.rounded = true;
        let found = input.prepare(&images)?;
        assert_eq!(found, found.round(), "{resize}");
        input.rounded = false;
        let exact = input.prepare(&images)?;
        let gap = (&found - &exact).abs().max().double_value(&[]);
        assert!((0.1..1.6).contains(&gap), "{resize}: {gap}");
    }
    Ok(())
}

/// Two resizings in sequence are those of two inputs, with whole levels in between.
#[test]
fn images_are_brought_to_one_size_first() -> TestResult {
    let images = Tensor::randint(256, [1, 3, 20, 31], kind::FLOAT_CPU).to_kind(Kind::Uint8);
    let crop = Resize::BicubicCrop { side: 16, crop: 16 };
    let mut stored = input(crop, PixelRange::Byte);
    stored.rounded = true;
    let mut both = input(Resize::Bicubic([9, 9]), PixelRange::Byte);
    let expected = both.prepare(&stored.prepare(&images)?.to_kind(Kind::Uint8))?;
    both.first = crop;
    assert_eq!(both.prepare(&images)?, expected);
    let floats = images.to_kind(Kind::Float) / 127.5 - 1.0;
    assert_eq!(both.prepare(&floats)?, expected);
    // Images of that size already are unchanged by it.
    let square = images.narrow(2, 0, 16).narrow(3, 0, 16);
    let plain = input(Resize::Bicubic([9, 9]), PixelRange::Byte);
    assert_eq!(both.prepare(&square)?, plain.prepare(&square)?);
    let json = serde_json::to_string(&both)?;
    assert_eq!(serde_json::from_str::<ImageInput>(&json)?, both, "{json}");
    Ok(())
}

#[test]
fn channels_are_repeated_and_normalized() -> TestResult {
    let mut input = ImageInput::unchanged(3);
    input.range = PixelRange::Unit;
    input.normalization =
        Some(Normalization { mean: vec![0.0, 0.5, 1.0], std: vec![1.0, 0.5, 0.25] });
    let grey = Tensor::full([2, 1, 1, 2], 255, (Kind::Uint8, Device::Cpu));
    let expected = Tensor::from_slice(&[1.0_f32, 1.0, 1.0, 1.0, 0.0, 0.0]).view([1, 3, 1, 2]);
    assert_eq!(input.prepare(&grey)?, expected.expand([2, 3, 1, 2], false));
    // Nothing is converted: the kind stays.
    let doubles = Tensor::rand([1, 3, 2, 2], kind::DOUBLE_CPU);
    assert_eq!(ImageInput::unchanged(3).prepare(&doubles)?, doubles);
    for bad in [[1, 2, 4, 4], [0, 3, 4, 4], [1, 3, 0, 4]] {
        let refused = input.prepare(&Tensor::zeros(bad, kind::FLOAT_CPU));
        assert!(matches!(refused, Err(Error::Argument(ArgumentError::Shape { .. }))), "{bad:?}");
    }
    Ok(())
}

#[test]
fn text_forms_come_back() -> TestResult {
    let all = [
        ImageInput::unchanged(1),
        ImageInput::clean_fid(),
        ImageInput::pytorch_fid(),
        ImageInput::torch_fidelity(),
        ImageInput::imagenet(),
        ImageInput::clip(224),
    ];
    for input in all {
        input.ensure_valid()?;
        assert_eq!(input.resize.to_string().parse::<Resize>()?, input.resize);
        let json = serde_json::to_string(&input)?;
        assert_eq!(serde_json::from_str::<ImageInput>(&json)?, input, "{json}");
    }
    let bad = ["", "bicubic", "bicubic-antialias-0x5", "bilinear-9", "bilinear-tf1-9x99999"];
    for text in [&bad[..], &["bicubic-antialias-5-crop-6", "bilinear-9x-9", "lanczos-9x9"]].concat()
    {
        let error = text.parse::<Resize>().expect_err(text);
        assert!(error.invalid().is_some_and(|invalid| invalid.field == "resize"), "{error}");
    }
    Ok(())
}

#[test]
fn settings_that_do_not_fit() {
    let refused = |change: fn(&mut ImageInput)| {
        let mut input = ImageInput::imagenet();
        change(&mut input);
        let error = input.ensure_valid().expect_err("this must be refused");
        error.invalid().map(|invalid| invalid.field.clone()).expect("an invalid setting")
    };
    assert_eq!(refused(|input| input.channels = 0), "channels");
    assert_eq!(refused(|input| input.channels = 1), "normalization.mean");
    assert_eq!(refused(|input| input.resize = Resize::Bilinear([0, 1])), "resize");
    let std = |input: &mut ImageInput| {
        if let Some(normalization) = &mut input.normalization {
            normalization.std[1] = 0.0;
        }
    };
    assert_eq!(refused(std), "normalization.std");
}
