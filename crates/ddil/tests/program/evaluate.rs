//! `evaluate` with references and extractors of the user's own.

use std::fs;
use std::path::Path;

use ddil_metrics::{Reference, Statistics, frechet_distance};
use serde_json::Value;
use tch::{CModule, Kind, Tensor, kind};

use crate::support::{TestResult, Workshop};

/// The input of the network of [`network`].
pub(crate) const INPUT: &str = r#"{"resize":"bicubic-antialias-8x8","range":"byte"}"#;

/// A TorchScript file that returns twelve features: the means of four quarters of each channel.
pub(crate) fn network(workshop: &Workshop) -> TestResult {
    let mut forward =
        |inputs: &[Tensor]| vec![inputs[0].adaptive_avg_pool2d([2, 2]).flatten(1, -1)];
    let images = Tensor::ones([2, 3, 8, 8], kind::FLOAT_CPU);
    let module = CModule::create_by_tracing("network", "forward", &[images], &mut forward)?;
    Ok(module.save(workshop.path("network.pt"))?)
}

/// `n` RGB images of different sizes; `offset` brightens them.
fn images(folder: &Path, n: u8, offset: u8) -> TestResult {
    fs::create_dir_all(folder.join("more"))?;
    for index in 0..n {
        let (width, height) = (5 + u32::from(index % 4), 9 - u32::from(index % 3));
        let name =
            if index % 2 == 0 { format!("{index:02}.png") } else { format!("more/{index:02}.png") };
        let mut png = png::Encoder::new(fs::File::create(folder.join(name))?, width, height);
        png.set_color(png::ColorType::Rgb);
        let random = |at: u32| {
            let hash = (at + 1).wrapping_mul(2_654_435_761).wrapping_add(u32::from(index) * 40_503);
            offset + ((hash >> 16) % 150) as u8
        };
        let pixels: Vec<u8> = (0..3 * width * height).map(random).collect();
        png.write_header()?.write_image_data(&pixels)?;
    }
    Ok(())
}

/// The rows of the JSON file that a call wrote.
fn rows(workshop: &Workshop, arguments: &[&str]) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let json = workshop.path("rows.json");
    let _ = fs::remove_file(&json);
    workshop.ddil(&[&["evaluate"], arguments, &["--json", "rows.json"]].concat()).succeeded();
    Ok(serde_json::from_slice(&fs::read(json)?)?)
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("`{name}` in {row}"))
}

#[test]
fn folders_of_any_sizes_are_compared_on_any_network() -> TestResult {
    let workshop = Workshop::new();
    network(&workshop)?;
    images(&workshop.path("real"), 40, 60)?;
    images(&workshop.path("drawn"), 30, 75)?;
    let extractor = ["--extractor", "network.pt", "--extractor-input", INPUT];
    let compared = |reference: &str| {
        let arguments = [&["drawn", "--reference", reference], &extractor[..]].concat();
        rows(&workshop, &arguments).map(|rows| rows[0].clone())
    };
    let whole = compared("real")?;
    assert_eq!((&whole["samples"], &whole["reference_samples"]), (&30.into(), &40.into()));
    assert_eq!(whole["input"]["resize"], "bicubic-antialias-8x8");
    assert!(whole["extractor"].as_str().is_some_and(|id| id.starts_with("network-")), "{whole}");
    // Fifteen levels brighter in each of twelve features, and little else.
    let frechet = number(&whole, "frechet");
    assert!((0.5..2.0).contains(&(frechet / (12.0 * 15.0 * 15.0))), "{frechet}");
    for name in ["kid", "precision", "recall", "density", "coverage"] {
        assert!(number(&whole, name).is_finite());
    }

    // From a file: to the digit the same; and it can be the subject of another program.
    let save = [&["real", "--save-statistics", "real.safetensors"], &extractor[..]].concat();
    workshop.ddil(&[&["evaluate"], &save[..]].concat()).succeeded();
    assert_eq!(compared("real.safetensors")?["frechet"], whole["frechet"]);
    assert_eq!(compared("real.safetensors")?["kid"], whole["kid"]);
    workshop.ddil(&[&["evaluate"], &save[..]].concat()).refused(&["real.safetensors", "exists"]);

    // As pytorch-fid stores statistics: without features, thus only the Fréchet distance.
    let statistics = Reference::from_file(workshop.path("real.safetensors"))?;
    let npz = workshop.path("real.npz");
    let (mean, covariance) = (statistics.statistics().mean(), statistics.statistics().covariance());
    let sigma = Tensor::from_slice(covariance).view([12, 12]);
    Tensor::write_npz(&[("mu", Tensor::from_slice(mean)), ("sigma", sigma)], &npz)?;
    let row = compared("real.npz")?;
    assert!((number(&row, "frechet") / frechet - 1.0).abs() < 1e-12);
    assert!(row.get("kid").is_none() && row.get("coverage").is_none(), "{row}");
    Ok(())
}

#[test]
fn a_folder_sorted_by_class_is_compared_as_a_whole() -> TestResult {
    let workshop = Workshop::new();
    // Dark images first, then bright ones; and both in the images to compare, a fourth as many.
    for (folder, count) in [("real", 32), ("drawn", 8)] {
        for (class, offset) in [("a_dark", 0), ("b_bright", 100)] {
            images(&workshop.path(folder).join(class), count, offset)?;
        }
    }
    network(&workshop)?;
    let arguments =
        ["drawn", "--reference", "real", "--extractor", "network.pt", "--extractor-input", INPUT];
    let row = &rows(&workshop, &arguments)?[0];
    // Of dark images alone, the first of the folder, bright ones are no neighbours: precision would be at most 0.5.
    assert!(number(row, "precision") > 0.5, "{row}");
    Ok(())
}

#[test]
fn standard_errors_are_measured_on_request() -> TestResult {
    let workshop = Workshop::new();
    network(&workshop)?;
    images(&workshop.path("real"), 40, 60)?;
    images(&workshop.path("drawn"), 40, 70)?;
    let arguments = [
        "drawn",
        "--reference",
        "real",
        "--extractor",
        "network.pt",
        "--extractor-input",
        INPUT,
        "--standard-errors",
        "20",
    ];
    let row = rows(&workshop, &arguments)?.remove(0);
    let printed = workshop.ddil(&[&["evaluate"], &arguments[..]].concat()).succeeded().stdout;
    let kid = format!("{:.3}", 1e3 * number(&row, "kid"));
    assert!(printed.contains("+- frechet") && printed.contains(&kid), "{printed}");
    let errors = &row["standard_errors"];
    assert_eq!(errors["halves"], 20);
    for name in ["precision", "recall", "density", "coverage"] {
        assert!(number(errors, name) >= 0.0, "{name}: {errors}");
    }
    assert!(number(errors, "kid") > 0.0 && number(errors, "frechet") > 0.0, "{errors}");
    assert!(number(errors, "frechet") < number(&row, "frechet"));
    Ok(())
}

#[test]
fn a_model_is_measured_against_its_own_data() -> TestResult {
    let workshop = Workshop::with_teacher();
    let arguments =
        ["teacher", "--data", "data", "--extractor", "raw_pixels", "-n", "12", "--steps", "2"];
    let row = rows(&workshop, &arguments)?.remove(0);
    assert_eq!((&row["dataset"], &row["samples"]), (&"images/train".into(), &12.into()));
    assert!(row.get("solver").is_none(), "{row}");
    // With two steps both end on the same prediction; with three the history matters.
    let three = |more: &[&str]| rows(&workshop, &[&arguments[..8], &["3"], more].concat());
    let (ddim, solved) = (three(&[])?.remove(0), three(&["--sampler", "uni-pc"])?.remove(0));
    assert_eq!(solved["solver"]["method"]["kind"], "uni_pc");
    assert_ne!(solved["frechet"], ddim["frechet"]);
    // A run knows its data: nothing but the features has to be named.
    let run = workshop.complete("train", "own", &[]);
    let run = run.display().to_string();
    let row = rows(&workshop, &[&run, "--extractor", "raw_pixels", "-n", "12", "--steps", "2"])?
        .remove(0);
    assert_eq!(row["dataset"], "images/train");
    // Samples of the program as a reference: equal noise, thus equal samples.
    let drawn = [
        "evaluate",
        "teacher",
        "--save-statistics",
        "drawn.safetensors",
        "--extractor",
        "raw_pixels",
    ];
    workshop.ddil(&[&drawn[..], &["-n", "12", "--steps", "2"]].concat()).succeeded();
    let itself = [
        "teacher",
        "--reference",
        "drawn.safetensors",
        "--extractor",
        "raw_pixels",
        "-n",
        "12",
        "--steps",
        "2",
    ];
    let row = rows(&workshop, &itself)?.remove(0);
    assert!(number(&row, "frechet").abs() < 1e-9 && number(&row, "coverage") == 1.0, "{row}");
    Ok(())
}

/// Which classes the data of a run lack does not depend on what its samples are compared with.
#[test]
fn classes_that_the_data_lack_are_measured_with_any_reference() -> TestResult {
    let workshop = Workshop::with_teacher();
    let poor = ["data.exclude_classes=[\"class0\", \"class2\"]", "prompts.source=classes"];
    workshop.complete("distill", "poor", &poor);
    workshop.complete("distill", "all", &[]);
    let draw = ["sample", "teacher", "-n", "12", "--steps", "2", "--output"];
    fs::create_dir(workshop.path("drawn"))?;
    workshop.ddil(&[&draw[..], &["drawn/teacher.safetensors"]].concat()).succeeded();
    let measured = |run: &str, more: &[&str]| {
        let fixed = [run, "--extractor", "raw_pixels", "-n", "12", "--teacher-samples", "drawn"];
        let row = rows(&workshop, &[&fixed[..], more].concat())?.remove(0);
        Ok::<Value, Box<dyn std::error::Error>>(row["missing_classes"].clone())
    };
    let missing = measured("runs/poor", &[])?;
    assert_eq!(missing["classes"], serde_json::json!(["class0", "class2"]));
    assert_eq!(missing["samples"], 8);
    assert!(number(&missing, "frechet_to_teacher") > 0.0, "{missing}");
    for more in [&["--reference", "data"][..], &["--shift-samples", "6"], &["--data", "data"]] {
        assert_eq!(measured("runs/poor", more)?, missing, "{more:?}");
    }
    assert!(measured("runs/all", &["--reference", "data"])?.is_null());

    // Without the data that is not known, which is no error and is said.
    fs::rename(workshop.path("data"), workshop.path("moved"))?;
    assert!(measured("runs/poor", &["--reference", "moved"])?.is_null());
    let call = ["evaluate", "runs/poor", "--reference", "moved", "--extractor", "raw_pixels"];
    let ended = workshop.ddil(&[&call[..], &["-n", "12"]].concat()).succeeded();
    let said: Vec<&str> =
        ended.stderr.lines().filter(|line| line.contains("data of the run lack")).collect();
    let place = workshop.path("data").display().to_string();
    assert!(said.len() == 1 && said[0].contains(&place), "{}", ended.stderr);
    Ok(())
}

/// Of samples in files, the classes are those of the model that drew them.
#[test]
fn the_model_of_samples_is_opened_first_and_warned_of_without_effect() -> TestResult {
    let workshop = Workshop::with_teacher();
    fs::create_dir(workshop.path("drawn"))?;
    let draw = ["sample", "teacher", "-n", "12", "--steps", "2", "--output", "drawn/a.safetensors"];
    workshop.ddil(&draw).succeeded();
    let drawn = ["drawn", "--reference", "data", "--classes-of"];
    let with = |more: &[&'static str]| [&drawn[..], more].concat();
    refused(&workshop, &with(&["none", "--extractor", "none.pt"]), &["--classes-of", "none"]);
    refused(&workshop, &["data", "--classes-of", "teacher"], &["--classes-of is for", "data"]);
    let call = [&["evaluate"], &with(&["teacher", "--extractor", "raw_pixels"])[..]].concat();
    let ended = workshop.ddil(&call).succeeded();
    for words in ["--classes-of has no effect", "raw-pixels-1x8x8", "the classes of teacher"] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
    Ok(())
}

/// `ddil evaluate` with these arguments is refused with these words.
#[track_caller]
fn refused(workshop: &Workshop, arguments: &[&str], words: &[&str]) {
    workshop.ddil(&[&["evaluate"], arguments].concat()).refused(words);
}

/// The arguments of the traced network, with an input.
fn with(input: &str) -> [&str; 4] {
    ["--extractor", "network.pt", "--extractor-input", input]
}

#[test]
fn what_cannot_be_compared_is_refused_before_it_is_drawn() -> TestResult {
    let workshop = Workshop::with_teacher();
    network(&workshop)?;
    images(&workshop.path("real"), 4, 60)?;
    images(&workshop.path("one"), 1, 60)?;
    let itself = ["real", "--reference", "real"];
    let on = |extractor| [&itself[..], &["--extractor", extractor]].concat();
    let cases: [(&[&str], &[&str]); 12] = [
        // Nothing is scored against clothing unless a reference or data are named.
        (&["teacher"], &["--reference", "--data"]),
        (&["real"], &["--reference", "--data"]),
        (&itself, &["--extractor is not set", "inception-2015-12-05.pt"]),
        (&["teacher", "--data", "data"], &["--extractor is not set"]),
        (
            &["teacher", "--data", "data", "--extractor", "fashion_classifier"],
            &["[1 or more, 1, 32, 32]"],
        ),
        (&on("network.pt"), &["--extractor-input", "clean-fid"]),
        (&on("none.pt"), &["none.pt", "TorchScript"]),
        (&on("raw_pixels"), &["02.png", "does not resize"]),
        (&[&itself[..], &with("lanczos")].concat(), &["lanczos", "clean-fid"]),
        (&[&itself[..], &with(r#"{"resize":"bilinear-0x3"}"#)].concat(), &["bilinear-0x3"]),
        (&[&["real", "--reference", "gone"], &with(INPUT)[..]].concat(), &["gone", ".npz"]),
        (&[&["real", "--reference", "one"], &with(INPUT)[..]].concat(), &["at least 2"]),
    ];
    for (arguments, words) in cases {
        refused(&workshop, arguments, words);
    }
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_refused() -> TestResult {
    let workshop = Workshop::new();
    network(&workshop)?;
    // A covariance of all pixels would exhaust memory.
    let large = workshop.path("large");
    fs::create_dir(&large)?;
    let mut png = png::Encoder::new(fs::File::create(large.join("a.png"))?, 80, 80);
    png.set_color(png::ColorType::Rgb);
    png.write_header()?.write_image_data(&vec![9; 80 * 80 * 3])?;
    let large = ["large", "--reference", "large", "--extractor", "raw_pixels"];
    refused(&workshop, &large, &["19200 values per image", "at most 16384"]);

    images(&workshop.path("few"), 8, 60)?;
    let few = [&["few", "--reference", "few"], &with(INPUT)[..]].concat();
    let errors = |halves| [&few[..], &["--standard-errors", halves]].concat();
    refused(&workshop, &errors("1"), &["--standard-errors is 1"]);
    refused(&workshop, &errors("4"), &["--standard-errors", "halves of 8 images"]);
    let nowhere = [&few[..], &["--save-statistics", "none/here.safetensors"]].concat();
    refused(&workshop, &nowhere, &["none/here.safetensors", "does not exist"]);
    Ok(())
}

#[test]
fn statistics_that_do_not_fit_are_refused() -> TestResult {
    let workshop = Workshop::new();
    network(&workshop)?;
    images(&workshop.path("real"), 4, 60)?;
    let save = ["evaluate", "real", "--save-statistics", "real.safetensors"];
    workshop.ddil(&[&save[..], &with(INPUT)].concat()).succeeded();
    let other = INPUT.replace("8x8", "4x4");
    refused(
        &workshop,
        &[&["real", "--reference", "real.safetensors"], &with(&other)[..]].concat(),
        &["input", "8x8", "4x4", "make the reference again"],
    );
    fs::write(workshop.path("text.npz"), "no archive")?;
    let text = [&["real", "--reference", "text.npz"], &with(INPUT)[..]].concat();
    refused(&workshop, &text, &["text.npz"]);
    Ok(())
}

#[test]
fn few_images_are_warned_of() -> TestResult {
    let workshop = Workshop::new();
    network(&workshop)?;
    images(&workshop.path("real"), 12, 60)?;
    let arguments = [
        "evaluate",
        "real",
        "--reference",
        "real",
        "--extractor",
        "network.pt",
        "--extractor-input",
        INPUT,
    ];
    let ended = workshop.ddil(&arguments).succeeded();
    let text = ended.stderr;
    assert!(text.contains("12 images for 12 features") && text.contains("KID"), "{text}");
    Ok(())
}

#[test]
fn saved_statistics_are_those_of_the_features() -> TestResult {
    let workshop = Workshop::new();
    network(&workshop)?;
    images(&workshop.path("real"), 20, 60)?;
    let save =
        ["evaluate", "real", "--save-statistics", "real.safetensors", "--extractor", "network.pt"];
    workshop.ddil(&[&save[..], &["--extractor-input", INPUT]].concat()).succeeded();
    let reference = Reference::from_file(workshop.path("real.safetensors"))?;
    let features = reference.features().ok_or("features are kept")?;
    assert_eq!((features.size(), features.kind()), (vec![20, 12], Kind::Float));
    let again = Statistics::from_features(features)?;
    assert!(frechet_distance(reference.statistics(), &again)?.abs() < 1e-6);
    assert_eq!(reference.name(), "real");
    Ok(())
}
