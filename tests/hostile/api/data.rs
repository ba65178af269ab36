use ddil_core::{RandomStreams, Stream};
use ddil_data::{
    BatchIndices, EncodedDataset, Error, FashionMnist, ImageDataset, ImageFiles, ImageFolder,
    SampleChoice, choose_samples, flip_horizontally, read_cropped, read_image_folder_scaled,
};
use ddil_metrics::RawPixels;
use tch::{Device, Kind, Tensor};

use super::cases::{Cases, ODD_WHOLES, outcome};
use crate::inputs::{image_bytes, repository};

#[test]
fn ddil_data() {
    let mut cases = Cases::default();
    images(&mut cases);
    order(&mut cases);
    encoded(&mut cases);
    folders(&mut cases);
    image_folders(&mut cases);
    image_files(&mut cases);
    cases.corrupted_in_inputs(&[
        "read_captions",
        "read_prompts",
        "read_cropped",
        "read_image_folder",
        "ImageFolder::read",
        "ImageFiles::in_folder",
        "ImageFiles::for_each",
        "read_idx_images",
        "read_idx_labels",
        "EncodedInfo::from_folder",
        "EncodedDataset::open",
    ]);
    cases.cannot_fail(&["FashionMnist::test_name"]);
    cases.finish("ddil-data");
}

fn images(cases: &mut Cases) {
    let pixels = Tensor::zeros([6, 3, 4, 2], (Kind::Uint8, Device::Cpu));
    let labels = Tensor::from_slice(&[0_i64, 1, 2, 0, 1, 2]);
    cases.tensors("ImageDataset::new", &[&pixels, &labels], |t| {
        outcome(ImageDataset::new(&t[0], Some(&t[1])))
    });
    let names = || vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
    cases.tensors("ImageDataset::with_class_names", &[&pixels, &labels], |t| {
        outcome(ImageDataset::with_class_names(&t[0], Some(&t[1]), names()))
    });
    let dataset = ImageDataset::new(&pixels, Some(&labels)).expect("they fit");
    cases.integers("ImageDataset::batch", |index| outcome(dataset.batch(&[0, index])));
    cases.once("ImageDataset::batch", "no index", || outcome(dataset.batch(&[])));
    cases.integers("ImageDataset::shuffled", |seed| outcome(dataset.shuffled(seed as u64)));
    for first in ODD_WHOLES {
        cases.integers("ImageDataset::range", |len| outcome(dataset.range(first, len.min(1000))));
    }
    cases.integers("ImageDataset::select", |index| outcome(dataset.select(&[0, index])));
    cases.once("ImageDataset::select", "no index", || outcome(dataset.select(&[])));
    for side in ODD_WHOLES {
        // Sides of a million pixels are memory, not an error.
        cases.integers("ImageDataset::scaled", |other| {
            outcome(dataset.scaled([side, other].map(|side| side.min(64))))
        });
    }
    let split = || dataset.shallow_clone();
    let fashion = FashionMnist { train: split(), test: split() };
    cases.integers("FashionMnist::scaled", |side| outcome(fashion.scaled([side.min(64); 2])));
    let unlabelled = ImageDataset::new(&pixels, None).expect("it fits");
    for excluded in [&[][..], &["0"], &["0", "1", "2"], &["3"], &["", "\u{0}"]] {
        let names: Vec<String> = excluded.iter().map(|name| (*name).to_owned()).collect();
        for dataset in [&dataset, &unlabelled] {
            cases.once("ImageDataset::without_classes", &format!("{names:?}"), || {
                outcome(dataset.without_classes(&names))
            });
        }
    }
    cases.integers("ImageDataset::relabelled", |label| {
        outcome(dataset.select(&[0]).and_then(|one| one.relabelled(&[0, 1, label], names())))
    });
    cases.once("ImageDataset::relabelled", "too few labels", || {
        outcome(dataset.select(&[0]).and_then(|one| one.relabelled(&[0], names())))
    });
    cases.once("ImageDataset::shallow_clone", "all", || {
        outcome(dataset.shallow_clone().batch(&[0, 5]))
    });
    cases.tensors("flip_horizontally", &[&pixels], |t| {
        outcome(flip_horizontally(&t[0], &[true; 6]))
    });
    cases.once("flip_horizontally", "no mark", || outcome(flip_horizontally(&pixels, &[])));
}

fn order(cases: &mut Cases) {
    for len in [0, 1, 5, -1, i64::MIN] {
        for choice in [SampleChoice::First, SampleChoice::Random] {
            cases
                .integers("choose_samples", |count| outcome(choose_samples(len, count, choice, 3)));
        }
    }
    for len in ODD_WHOLES {
        cases.integers("BatchIndices::new", |size| {
            outcome(BatchIndices::new(len, size as usize, 0))
        });
    }
    let indices = || BatchIndices::new(5, 3, u64::MAX).expect("good sizes");
    for rank in [0, 1, usize::MAX] {
        for of in [0, 1, 2, usize::MAX] {
            let what = format!("{rank} of {of}");
            cases.once("BatchIndices::for_rank", &what, || outcome(indices().for_rank(rank, of)));
        }
    }
    cases.integers("BatchIndices::at", |step| {
        let chosen = indices().at(step as u64);
        assert!(chosen.iter().all(|index| (0..5).contains(index)));
        Ok(())
    });
    cases.integers("BatchIndices::flips_at", |step| {
        assert_eq!(indices().flips_at(step as u64).len(), 3);
        Ok(())
    });
    cases.integers("BatchIndices::epoch_of", |step| {
        let _ = indices().epoch_of(step as u64);
        Ok(())
    });
}

fn encoded(cases: &mut Cases) {
    let folder = repository().join("tests/golden/formats/v1/encoded");
    let data = EncodedDataset::open(&folder, None).expect("encoded data");
    cases.integers("EncodedDataset::prompts_of", |sample| outcome(data.prompts_of(sample)));
    cases.integers("EncodedDataset::prompt_conditioning", |row| {
        outcome(data.prompt_conditioning(&[row]))
    });
    cases.integers("EncodedDataset::batch", |index| {
        let streams = RandomStreams::new(0, 0);
        let mut draws = valid_draws(&streams);
        outcome(data.batch(&[index], [1, 2, 2], &mut draws, Device::Cpu))
    });
}

fn valid_draws(streams: &RandomStreams) -> ddil_core::Draws {
    streams.draws(0, Stream::Data, Device::Cpu).expect("there is a CPU")
}

fn folders(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    for place in [folder.path(), "nul\0byte".as_ref(), "/dev/null".as_ref()] {
        let what = place.display().to_string();
        cases.once("FashionMnist::from_folder", &what, || {
            outcome(FashionMnist::from_folder(Some(place)))
        });
        cases.once("FashionMnist::train_labels", &what, || {
            outcome(FashionMnist::train_labels(Some(place)))
        });
        cases.once("read_cropped", &what, || outcome(read_cropped(place, 3, [4, 4])));
    }
    let path = folder.path().join("a.png");
    std::fs::write(&path, image_bytes(png::ColorType::Grayscale, png::BitDepth::Eight, 9))
        .expect("there is room");
    for side in ODD_WHOLES {
        cases.integers("read_image_folder_scaled", |other| {
            let sides = [side, other].map(|side| side.min(64));
            outcome(read_image_folder_scaled(folder.path(), sides, 2))
        });
        cases.integers("read_cropped", |other| {
            // Sides of a million pixels are memory, not an error.
            let sides = [side, other].map(|side| side.min(64));
            outcome(read_cropped(&path, 1, sides))
        });
        cases.once("read_cropped", &format!("{side} channels"), || {
            outcome(read_cropped(&path, side.min(64), [2, 2]))
        });
    }
}

/// Files before they are read.
fn image_folders(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = image_bytes(png::ColorType::Grayscale, png::BitDepth::Eight, 9);
    for class in ["0", "1"] {
        std::fs::create_dir(folder.path().join(class)).expect("there is room");
        std::fs::write(folder.path().join(class).join("a.png"), &bytes).expect("there is room");
    }
    for place in [folder.path(), "nul\0byte".as_ref(), "/dev/null".as_ref(), "".as_ref()] {
        let what = place.display().to_string();
        cases.once("ImageFolder::open", &what, || outcome(ImageFolder::open(place)));
    }
    let files = ImageFolder::open(folder.path()).expect("two images");
    cases.integers("ImageFolder::select", |index| outcome(files.select(&[0, index])));
    cases.once("ImageFolder::select", "nothing", || outcome(files.select(&[])));
    for excluded in [&[][..], &["0"], &["0", "1"], &["", "\u{0}"]] {
        let names: Vec<String> = excluded.iter().map(|name| (*name).to_owned()).collect();
        cases.once("ImageFolder::without_classes", &format!("{names:?}"), || {
            outcome(files.without_classes(&names))
        });
    }
    cases.integers("ImageFolder::read_scaled", |threads| {
        outcome(files.read_scaled([2, 2], threads as usize))
    });
}

fn image_files(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = image_bytes(png::ColorType::Grayscale, png::BitDepth::Eight, 9);
    std::fs::write(folder.path().join("a.png"), bytes).expect("there is room");
    let files = ImageFiles::in_folder(folder.path()).expect("an image");
    cases.integers("ImageFiles::image", |index| outcome(files.image(index as usize)));
    cases.integers("ImageFiles::select", |index| outcome(files.select(&[0, index as usize])));
    cases.once("ImageFiles::select", "nothing", || outcome(files.select(&[])));
    cases.integers("ImageFiles::shuffled", |seed| {
        assert_eq!(files.shuffled(seed as u64).paths(), files.paths());
        Ok(())
    });
    cases.integers("ImageFiles::skip", |count| {
        assert!(files.skip(count as usize).is_none_or(|rest| rest.len() == 1));
        Ok(())
    });
    for shape in [[1, 4, 4], [3, 4, 4], [0, 0, 0], [-1, 2, 2]] {
        let extractor = RawPixels::new(shape);
        cases.integers("ImageFiles::features", |threads| {
            outcome(files.features(&extractor, threads as usize, |_| Ok::<_, Error>(())))
        });
    }
}
