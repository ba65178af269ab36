//! Images from disk, and their order in training.

use std::{
    collections::HashSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use ddil_data::{
    BatchIndices, Error, FashionMnist, ImageDataset, ImageFolder, SampleChoice, choose_samples,
    fashion_mnist_folders, flip_horizontally, read_cropped, read_idx_images, read_idx_labels,
    read_image_folder, read_image_folder_scaled,
};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

const IMAGES_MAGIC: [u8; 4] = [0, 0, 8, 3];
const LABELS_MAGIC: [u8; 4] = [0, 0, 8, 1];

fn idx(magic: [u8; 4], dims: &[u32], values: &[u8]) -> Vec<u8> {
    let dims = dims.iter().flat_map(|dim| dim.to_be_bytes());
    magic.into_iter().chain(dims).chain(values.iter().copied()).collect()
}

fn written(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).expect("the folder can be written");
    path
}

#[test]
fn idx_files_are_read_plain_and_packed() -> TestResult {
    let folder = tempfile::tempdir()?;
    let bytes = idx(IMAGES_MAGIC, &[2, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]);
    let images = read_idx_images(&written(&folder, "images", &bytes))?;
    assert_eq!((images.size(), images.kind()), (vec![2, 2, 3], Kind::Uint8));
    assert_eq!(images.int64_value(&[1, 1, 2]), 255);
    assert_eq!(images.int64_value(&[0, 1, 0]), 3);

    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&bytes)?;
    let packed = written(&folder, "images.gz", &packer.finish()?);
    assert_eq!(read_idx_images(&packed)?, images);

    let labels =
        read_idx_labels(&written(&folder, "labels", &idx(LABELS_MAGIC, &[3], &[9, 0, 200])))?;
    assert_eq!(labels, Tensor::from_slice(&[9_i64, 0, 200]));
    Ok(())
}

#[test]
fn damaged_idx_files() -> TestResult {
    let folder = tempfile::tempdir()?;
    let good = idx(IMAGES_MAGIC, &[2, 2, 3], &[7; 12]);
    for (name, bytes, expected) in
        [("short", &good[..27], 28), ("long", &[&good[..], &[0]].concat(), 28)]
    {
        let path = written(&folder, name, bytes);
        let error = read_idx_images(&path).expect_err("the length is wrong");
        assert!(
            matches!(&error, Error::IdxLength { found, expected: e, dims, .. }
                if *found == bytes.len() as u64 && *e == expected && dims == &[2, 2, 3]),
            "{error}"
        );
        assert!(error.to_string().contains(name), "{error}");
    }
    let in_header = written(&folder, "in-header", &good[..10]);
    assert!(matches!(
        read_idx_images(&in_header),
        Err(Error::IdxLength { found: 10, expected: 16, .. })
    ));
    // Dimensions whose product is beyond 64 bits.
    let huge = written(&folder, "huge", &idx(IMAGES_MAGIC, &[u32::MAX; 3], &[1]));
    assert!(matches!(read_idx_images(&huge), Err(Error::IdxLength { .. })));

    let path = written(&folder, "swapped", &good);
    assert!(matches!(
        read_idx_labels(&path),
        Err(Error::IdxHeader { found, .. }) if found == IMAGES_MAGIC
    ));
    for (name, bytes) in [("empty", &[][..]), ("html", b"<html>"), ("gzip", &[0x1f, 0x8b, 8, 0])] {
        let path = written(&folder, name, bytes);
        assert!(matches!(read_idx_images(&path), Err(Error::IdxHeader { .. })), "{name}");
    }
    let not_packed = written(&folder, "not-packed.gz", &good);
    assert!(matches!(read_idx_images(&not_packed), Err(Error::Read { .. })));
    assert!(matches!(read_idx_images(&folder.path().join("absent")), Err(Error::Read { .. })));
    Ok(())
}

#[test]
fn missing_fashion_mnist_names_folder_and_remedy() -> TestResult {
    let folder = tempfile::tempdir()?;
    let error = FashionMnist::from_folder(Some(folder.path())).expect_err("the folder is empty");
    let message = error.to_string();
    assert!(message.contains(&folder.path().display().to_string()), "{message}");
    assert!(message.contains("make setup") && message.contains("DDIL_DATA"), "{message}");
    assert!(!fashion_mnist_folders().is_empty());
    Ok(())
}

#[test]
fn other_files_under_the_names_of_fashion_mnist() -> TestResult {
    let folder = tempfile::tempdir()?;
    let bytes = idx(IMAGES_MAGIC, &[1, 28, 28], &[0; 784]);
    let path = written(&folder, "train-images-idx3-ubyte", &bytes);
    let error = FashionMnist::from_folder(Some(folder.path())).expect_err("not the published file");
    assert!(matches!(error, Error::Checksum { path: named, .. } if named == path));
    Ok(())
}

#[test]
#[ignore = "needs Fashion-MNIST: `make setup`"]
fn fashion_mnist() -> TestResult {
    let FashionMnist { train, test } = FashionMnist::from_folder(None)?;
    assert_eq!((train.len(), test.len()), (60_000, 10_000));
    for (dataset, of_each) in [(&train, 6000), (&test, 1000)] {
        assert_eq!(dataset.image_shape(), [1, 32, 32]);
        let labels = dataset.labels().ok_or("no labels")?;
        let counts = labels.bincount::<Tensor>(None, 10);
        assert_eq!(counts, Tensor::full([10], of_each, kind::INT64_CPU));
    }
    assert_eq!(train.class_names()[9], "Ankle boot");
    assert_eq!(Some(&FashionMnist::train_labels(None)?), train.labels());

    let batch = train.batch(&[0, 1])?;
    // The first sample is an ankle boot, on a border of background.
    assert_eq!(batch.labels.ok_or("no labels")?.int64_value(&[0]), 9);
    for border in [batch.x0.narrow(2, 0, 2), batch.x0.narrow(3, 30, 2)] {
        assert_eq!(border.max().double_value(&[]), -1.0);
    }
    assert_eq!(batch.x0.max().double_value(&[]), 1.0);

    let data = FashionMnist { train: train.select(&[0, 1])?, test: test.select(&[0, 1])? };
    assert_eq!(data.test_name(), "fashion_mnist/test");
    let half = data.scaled([16, 16])?;
    assert_eq!((half.train.image_shape(), half.test.image_shape()), ([1, 16, 16], [1, 16, 16]));
    assert_eq!(half.test_name(), "fashion_mnist/test-16x16");
    assert_eq!(half.train.labels(), data.train.labels());
    Ok(())
}

fn pixels(n: i64) -> Tensor {
    Tensor::arange(n * 12, kind::INT64_CPU).remainder(256).to_kind(Kind::Uint8).view([n, 1, 3, 4])
}

#[test]
fn batches_are_scaled_and_in_order() -> TestResult {
    let labels = Tensor::from_slice(&[2_i64, 0, 1, 1]);
    let dataset = ImageDataset::new(&pixels(4), Some(&labels))?;
    let batch = dataset.batch(&[3, 0, 3])?;
    assert_eq!((batch.x0.size(), batch.x0.kind()), (vec![3, 1, 3, 4], Kind::Float));
    assert_eq!(batch.labels, Some(Tensor::from_slice(&[1_i64, 2, 1])));
    // Bytes come back from the floats exactly.
    let bytes = ((batch.x0 + 1.0) * 127.5).round().to_kind(Kind::Uint8);
    assert_eq!(bytes.get(0), pixels(4).get(3));
    assert_eq!(bytes.get(1), pixels(4).get(0));
    assert_eq!(dataset.class_names(), ["0", "1", "2"]);

    let all = Tensor::from_slice(&[0_u8, 255]).view([2, 1, 1, 1]);
    let ends = ImageDataset::new(&all, None)?.range(0, 9)?;
    assert_eq!(ends.x0.view(-1), Tensor::from_slice(&[-1.0_f32, 1.0]));
    assert!(ends.labels.is_none());
    Ok(())
}

fn named(labels: &[i64], names: &[&str]) -> ImageDataset {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    let labels = Tensor::from_slice(labels);
    ImageDataset::with_class_names(&pixels(labels.numel() as i64), Some(&labels), names)
        .expect("each label has a name")
}

fn label_list(dataset: &ImageDataset) -> Vec<i64> {
    Vec::try_from(dataset.labels().expect("there are labels")).expect("they are Int64")
}

#[test]
fn a_part_of_a_data_set_is_one() -> TestResult {
    let dataset = named(&[2, 0, 1, 2], &["bag", "coat", "shoe"]);
    let part = dataset.select(&[3, 3, 1])?;
    assert_eq!((part.len(), label_list(&part)), (3, vec![2, 2, 0]));
    assert_eq!(part.pixels().get(0), dataset.pixels().get(3));
    assert_eq!(part.class_names(), dataset.class_names());

    let without = dataset.without_classes(&["coat".to_owned(), "bag".to_owned()])?;
    assert_eq!(
        (label_list(&without), without.class_names()),
        (vec![0, 0], &["shoe".to_owned()][..])
    );
    assert_eq!(without.pixels().get(1), dataset.pixels().get(3));
    let same = dataset.without_classes(&[])?;
    assert_eq!(
        (label_list(&same), same.class_names()),
        (label_list(&dataset), dataset.class_names())
    );

    let names = ["x", "y", "z", "w"].map(str::to_owned).to_vec();
    let other = dataset.relabelled(&[3, 1, 1], names)?;
    assert_eq!((label_list(&other), other.class_names().len()), (vec![1, 3, 1, 1], 4));
    Ok(())
}

#[test]
fn a_part_that_does_not_exist() -> TestResult {
    let dataset = named(&[2, 0, 1, 2], &["bag", "coat", "shoe"]);
    let refused = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        dataset.without_classes(&names).expect_err("it cannot be left out").to_string()
    };
    assert_eq!(
        refused(&["bag", "hat"]),
        "`exclude_classes` is \"hat\"; expected names of the data's classes: bag, coat, shoe"
    );
    assert!(refused(&["bag", "coat", "shoe"]).contains("to leave samples"));
    let unlabelled = ImageDataset::new(&pixels(2), None)?;
    assert!(unlabelled.without_classes(&["bag".to_owned()]).is_err());
    assert!(matches!(dataset.select(&[0, 4]), Err(Error::Index { index: 4, len: 4 })));
    assert!(dataset.select(&[]).is_err());
    let names = || ["a", "b"].map(str::to_owned).to_vec();
    let few = dataset.select(&[0])?.relabelled(&[0, 1], names());
    assert!(matches!(few, Err(Error::Invalid(_))));
    let beyond = dataset.select(&[0])?.relabelled(&[0, 1, 2], names());
    assert!(matches!(beyond, Err(Error::Label { found: 2, num_classes: 2 })));
    Ok(())
}

#[test]
fn samples_are_chosen_evenly() -> TestResult {
    assert_eq!(choose_samples(5, 5, SampleChoice::Random, 9)?, [0, 1, 2, 3, 4]);
    assert_eq!(choose_samples(5, 2, SampleChoice::First, 9)?, [0, 1]);
    let mut counts = [0_u32; 5];
    let seeds = 2000;
    for seed in 0..seeds {
        let (few, more) = (
            choose_samples(5, 2, SampleChoice::Random, seed)?,
            choose_samples(5, 4, SampleChoice::Random, seed)?,
        );
        assert!(few[0] < few[1] && few.iter().all(|index| more.contains(index)));
        for index in &few {
            counts[*index as usize] += 1;
        }
    }
    // Each in two of five choices.
    let deviation = (seeds as f64 * 0.4 * 0.6).sqrt();
    assert!(counts.iter().all(|n| (f64::from(*n) - 800.0).abs() < 4.0 * deviation), "{counts:?}");
    for count in [-1, 0, 6] {
        assert!(choose_samples(5, count, SampleChoice::Random, 0).is_err());
    }
    Ok(())
}

#[test]
fn marked_images_are_mirrored() -> TestResult {
    let images = pixels(3);
    let flipped = flip_horizontally(&images, &[false, true, false])?;
    assert_eq!(flipped.get(0), images.get(0));
    assert_eq!(flipped.get(2), images.get(2));
    let row = |images: &Tensor| Vec::<i64>::try_from(images.get(1).get(0).get(0));
    let mirrored: Vec<i64> = row(&images)?.into_iter().rev().collect();
    assert_eq!(row(&flipped)?, mirrored);
    assert!(matches!(flip_horizontally(&images, &[true]), Err(Error::Tensor { .. })));
    Ok(())
}

#[test]
fn bad_samples() -> TestResult {
    let labels = |labels: &[i64]| Tensor::from_slice(labels);
    for bad in [pixels(2).squeeze(), pixels(2).to_kind(Kind::Float), pixels(2).narrow(0, 0, 0)] {
        assert!(matches!(ImageDataset::new(&bad, None), Err(Error::Tensor { name: "pixels", .. })));
    }
    let with =
        |labels: &Tensor| ImageDataset::new(&pixels(2), Some(labels)).expect_err("bad labels");
    assert!(matches!(with(&labels(&[0])), Error::LabelCount { images: 2, labels: 1 }));
    assert!(matches!(with(&labels(&[0, -1])), Error::Label { found: -1, .. }));
    assert!(matches!(with(&labels(&[0, 1]).to_kind(Kind::Float)), Error::Tensor { .. }));
    let unnamed = ImageDataset::with_class_names(
        &pixels(2),
        Some(&labels(&[0, 3])),
        ["a", "b"].map(str::to_owned).to_vec(),
    );
    assert!(matches!(unnamed, Err(Error::Label { found: 3, num_classes: 2 })));

    let dataset = ImageDataset::new(&pixels(2), None)?;
    for index in [-1, 2, i64::MAX] {
        assert!(matches!(dataset.batch(&[0, index]), Err(Error::Index { len: 2, .. })));
    }
    assert!(matches!(dataset.range(2, 1), Err(Error::Index { index: 2, len: 2 })));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Laid end to end, batches go through every sample once an epoch, at any size.
    #[test]
    fn every_sample_once_an_epoch(len in 1_i64..40, batch_size in 1_usize..50, seed: u64) {
        let mut indices = BatchIndices::new(len, batch_size, seed).expect("good sizes");
        let num_epochs = 3;
        let steps = (num_epochs * len as u64).div_ceil(batch_size as u64);
        let seen: Vec<i64> = (0..steps).flat_map(|step| indices.at(step)).collect();
        for epoch in seen.chunks_exact(len as usize).take(num_epochs as usize) {
            let distinct: HashSet<i64> = epoch.iter().copied().collect();
            prop_assert_eq!(distinct.len(), len as usize);
            prop_assert!(epoch.iter().all(|index| (0..len).contains(index)));
        }
    }

    /// A batch depends on seed and step, not on earlier requests.
    #[test]
    fn a_function_of_the_step(steps in prop::collection::vec(0_u64..1000, 1..8), seed: u64) {
        let mut wandering = BatchIndices::new(13, 5, seed).expect("good sizes");
        for step in steps {
            let mut fresh = BatchIndices::new(13, 5, seed).expect("good sizes");
            prop_assert_eq!(wandering.at(step), fresh.at(step));
            prop_assert_eq!(wandering.flips_at(step), fresh.flips_at(step));
        }
    }

    /// The ranks' batches, one after another, are the batch of a single process.
    #[test]
    fn ranks_share_a_batch(num_ranks in 1_usize..5, step in 0_u64..100, seed: u64) {
        let mut whole = BatchIndices::new(17, 3 * num_ranks, seed).expect("good sizes");
        let (mut shares, mut flips) = (Vec::new(), Vec::new());
        for rank in 0..num_ranks {
            let share = BatchIndices::new(17, 3, seed).expect("good sizes");
            let mut share = share.for_rank(rank, num_ranks).expect("the rank is one of them");
            shares.extend(share.at(step));
            flips.extend(share.flips_at(step));
        }
        prop_assert_eq!(shares, whole.at(step));
        prop_assert_eq!(flips, whole.flips_at(step));
    }
}

#[test]
fn epochs_and_seeds_are_shuffled_apart() -> TestResult {
    let mut indices = BatchIndices::new(200, 200, 1)?;
    let mut other_seed = BatchIndices::new(200, 200, 2)?;
    let orders = [indices.at(0), indices.at(1), other_seed.at(0), (0..200).collect()];
    for (i, one) in orders.iter().enumerate() {
        for other in &orders[i + 1..] {
            // Two independent orders agree in one place on average.
            let same = one.iter().zip(other).filter(|(one, other)| one == other).count();
            assert!(same < 10, "{same}");
        }
    }
    let heads = (0..50).flat_map(|step| indices.flips_at(step)).filter(|&flip| flip).count();
    assert!((4800..5200).contains(&heads), "{heads} of 10000");
    assert_eq!((indices.epoch_of(0), indices.epoch_of(7)), (0, 7));
    assert_eq!(BatchIndices::new(10, 4, 0)?.steps_per_epoch(), 3);
    // Steps far beyond any run do not overflow.
    assert_eq!(indices.at(u64::MAX).len(), 200);
    Ok(())
}

#[test]
fn impossible_sizes() {
    for (len, batch_size) in [(0, 1), (-1, 1), (1, 0)] {
        let refused = BatchIndices::new(len, batch_size, 0);
        assert!(matches!(refused, Err(Error::Invalid(_))));
    }
    let indices = BatchIndices::new(5, 2, 0).expect("good sizes");
    let refused = indices.for_rank(2, 2).err();
    let refused = refused.as_ref().and_then(Error::invalid);
    assert_eq!(refused.map(|invalid| &*invalid.field), Some("rank"));
}

fn write_png(path: &Path, (width, height): (u32, u32), colour: png::ColorType, pixels: &[u8]) {
    let file = fs::File::create(path).expect("the folder can be written");
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(colour);
    let mut writer = encoder.write_header().expect("the header can be written");
    writer.write_image_data(pixels).expect("as many pixels as the header says");
}

#[test]
fn unlabelled_images_are_ordered_by_name() -> TestResult {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    write_png(&at("b.PNG"), (2, 3), png::ColorType::Rgb, &[10; 18]);
    let first: Vec<u8> = (0..18).collect();
    write_png(&at("a.png"), (2, 3), png::ColorType::Rgb, &first);
    written(&folder, "notes.txt", b"not a picture");
    written(&folder, ".hidden.png", b"not a picture");
    fs::create_dir(at("empty"))?;

    let dataset = read_image_folder(folder.path())?;
    assert_eq!((dataset.len(), dataset.image_shape()), (2, [3, 3, 2]));
    assert!(dataset.labels().is_none() && dataset.class_names().is_empty());
    // Red of the second row's second pixel, and blue of the last.
    assert_eq!(dataset.pixels().int64_value(&[0, 0, 1, 1]), 9);
    assert_eq!(dataset.pixels().int64_value(&[0, 2, 2, 1]), 17);
    Ok(())
}

#[test]
fn subfolders_of_images_are_classes() -> TestResult {
    let folder = tempfile::tempdir()?;
    for (class, count) in [("shoe", 2), ("bag", 1)] {
        fs::create_dir(folder.path().join(class))?;
        for i in 0..count {
            let path = folder.path().join(class).join(format!("{i}.png"));
            write_png(&path, (2, 2), png::ColorType::Grayscale, &[count * 10 + i; 4]);
        }
    }
    let dataset = read_image_folder(folder.path())?;
    assert_eq!(dataset.class_names(), ["bag", "shoe"]);
    assert_eq!(dataset.labels(), Some(&Tensor::from_slice(&[0_i64, 1, 1])));
    assert_eq!(dataset.image_shape(), [1, 2, 2]);
    let firsts = dataset.pixels().select(1, 0).select(1, 0).select(1, 0);
    assert_eq!(firsts, Tensor::from_slice(&[10_u8, 20, 21]));

    write_png(&folder.path().join("loose.png"), (2, 2), png::ColorType::Grayscale, &[0; 4]);
    assert!(matches!(read_image_folder(folder.path()), Err(Error::MixedFolder { .. })));
    Ok(())
}

#[test]
fn images_of_any_sizes_are_scaled_and_cropped_as_one_by_one() -> TestResult {
    let folder = tempfile::tempdir()?;
    for (class, name, (width, height), colour) in [
        ("bag", "wide.png", (9, 4), png::ColorType::Rgb),
        ("bag", "same.png", (3, 3), png::ColorType::Rgb),
        ("shoe", "tall.png", (5, 12), png::ColorType::Grayscale),
    ] {
        fs::create_dir_all(folder.path().join(class))?;
        let channels = if colour == png::ColorType::Rgb { 3 } else { 1 };
        let levels: Vec<u8> =
            (0..width * height * channels).map(|i| (i * 37 % 251) as u8).collect();
        write_png(&folder.path().join(class).join(name), (width, height), colour, &levels);
    }
    let dataset = read_image_folder_scaled(folder.path(), [3, 3], 2)?;
    assert_eq!(ImageFolder::open(folder.path())?.labels(), Some(&[0, 0, 1][..]));
    assert_eq!((dataset.len(), dataset.image_shape()), (3, [3, 3, 3]));
    assert_eq!(dataset.class_names(), ["bag", "shoe"]);
    assert_eq!(dataset.labels(), Some(&Tensor::from_slice(&[0_i64, 0, 1])));
    for (index, name) in (0..).zip(["bag/same.png", "bag/wide.png", "shoe/tall.png"]) {
        let single = read_cropped(&folder.path().join(name), 3, [3, 3])?.pixels;
        let difference = (dataset.range(index, 1)?.x0.squeeze_dim(0) - single).abs().max();
        // Rounded to a level; 127.5 levels are 1.
        assert!(difference.double_value(&[]) <= 0.5 / 127.5 + 1e-6, "{name}: {difference:?}");
    }
    // A size that the images have changes nothing.
    let [one, many] =
        [1, 7].map(|threads| read_image_folder_scaled(&folder.path().join("bag"), [3, 3], threads));
    assert_eq!(one?.pixels(), many?.pixels());
    let unscaled = read_cropped(&folder.path().join("bag/same.png"), 3, [3, 3])?.pixels;
    assert_eq!(dataset.range(0, 1)?.x0.squeeze_dim(0), unscaled);

    let invalid = read_image_folder_scaled(folder.path(), [0, 3], 1);
    assert!(matches!(invalid, Err(Error::Invalid(_))), "{invalid:?}");
    // Errors are those of the first file in order, whatever thread reads it.
    written(&folder, "bag/a.png", b"not a picture");
    written(&folder, "shoe/b.png", b"not a picture");
    let Err(Error::Png { path, .. }) = read_image_folder_scaled(folder.path(), [3, 3], 2) else {
        panic!("a damaged file was read");
    };
    assert_eq!(path, folder.path().join("bag/a.png"));
    Ok(())
}

/// Images in memory and images of files are scaled alike, in every direction and with a part of them at a time.
#[test]
fn images_in_memory_are_scaled_as_those_of_files() -> TestResult {
    let folder = tempfile::tempdir()?;
    for class in 0..2_u32 {
        fs::create_dir(folder.path().join(class.to_string()))?;
        for image in 0..2 {
            let levels: Vec<u8> =
                (0..48).map(|i| (i * 89 + 31 * image + 7 * class).wrapping_mul(i) as u8).collect();
            let path = folder.path().join(format!("{class}/{image}.png"));
            write_png(&path, (8, 6), png::ColorType::Grayscale, &levels);
        }
    }
    let own = read_image_folder(folder.path())?;
    for size in [[3, 4], [6, 8], [2, 5], [4, 2], [11, 9]] {
        let (scaled, of_files) =
            (own.scaled(size)?, read_image_folder_scaled(folder.path(), size, 1)?);
        assert_eq!(scaled.pixels(), of_files.pixels(), "{size:?}");
        assert_eq!(scaled.labels(), of_files.labels());
        assert_eq!(scaled.class_names(), ["0", "1"]);
    }
    let many = own.select(&[0, 1, 2, 3].repeat(400))?.scaled([3, 4])?;
    assert_eq!(many.pixels(), &own.scaled([3, 4])?.pixels().repeat([400, 1, 1, 1]));

    // Too many values at once, before scaling and after it: two images at a time, then each alone.
    let part = Tensor::arange(256, (Kind::Uint8, tch::Device::Cpu)).view([1, 1, 16, 16]);
    let large = part.repeat([5, 1, 64, 128])
        + Tensor::arange_start(1, 6, (Kind::Uint8, tch::Device::Cpu)).view([5, 1, 1, 1]);
    let large = ImageDataset::new(&large, None)?;
    for (images, size) in [(&large, [3, 5]), (&large.scaled([64, 64])?, [2048, 2049])] {
        let scaled = images.scaled(size)?;
        for index in 0..5 {
            let alone = images.select(&[index])?.scaled(size)?;
            assert_eq!(scaled.select(&[index])?.pixels(), alone.pixels(), "{size:?}");
        }
    }
    Ok(())
}

/// Half the size: a pixel is the mean of four in each direction with the weights 1, 3, 3, 1.
#[test]
fn half_the_size_is_antialiased() -> TestResult {
    let levels = [0_u8, 40, 80, 240, 8, 16, 200, 96];
    let row = Tensor::from_slice(&levels).view([1, 1, 1, 8]);
    let rows = ImageDataset::new(&row.repeat([1, 1, 8, 1]), None)?;
    let half = rows.scaled([4, 4])?;
    let inner = |i: usize| {
        let [a, b, c, d] = [i - 1, i, i + 1, i + 2].map(|i| f64::from(levels[i]));
        ((a + 3.0 * b + 3.0 * c + d) / 8.0).round() as i64
    };
    for (column, from) in [(1, 2), (2, 4)] {
        for row in 0..4 {
            assert_eq!(half.pixels().int64_value(&[0, 0, row, column]), inner(from));
        }
    }
    // At the border the weight of the missing pixel is that of the others.
    assert_eq!(half.pixels().int64_value(&[0, 0, 0, 0]), (3 * 40 + 80 + 3) / 7);

    for refused in [[0, 4], [4, -1], [1, 1 << 40], [1, 8 * 65]] {
        let error = rows.scaled(refused).expect_err("no such size");
        assert!(error.invalid().is_some(), "{refused:?}: {error}");
    }
    Ok(())
}

/// Grey and RGB images of three classes.
fn mixed_folder() -> TestResult<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for (class, colour) in [
        ("bag", png::ColorType::Rgb),
        ("coat", png::ColorType::Grayscale),
        ("shoe", png::ColorType::Grayscale),
    ] {
        fs::create_dir(folder.path().join(class))?;
        for i in 0..4_u8 {
            let path = folder.path().join(class).join(format!("{i}.png"));
            let levels: Vec<u8> = (0..16 * colour.samples() as u8)
                .map(|at| at.wrapping_mul(29).wrapping_add(17 * i + class.len() as u8))
                .collect();
            write_png(&path, (4, 4), colour, &levels);
        }
    }
    Ok(folder)
}

/// Choosing files and then reading them is the same as reading all and then choosing.
#[test]
fn a_part_of_the_files_is_the_same_part_of_the_images() -> TestResult {
    let folder = mixed_folder()?;
    let (files, all) =
        (ImageFolder::open(folder.path())?, read_image_folder_scaled(folder.path(), [3, 3], 2)?);
    let same = |part: &ImageFolder, expected: &ImageDataset| -> TestResult {
        let read = part.read_scaled([3, 3], 2)?;
        assert_eq!((read.pixels(), read.labels()), (expected.pixels(), expected.labels()));
        assert_eq!(read.class_names(), expected.class_names());
        Ok(())
    };
    same(&files, &all)?;
    for excluded in [&["bag"][..], &["coat"], &["bag", "shoe"], &["shoe"]] {
        let excluded: Vec<String> = excluded.iter().map(|name| (*name).to_owned()).collect();
        let (files, all) = (files.without_classes(&excluded)?, all.without_classes(&excluded)?);
        same(&files, &all)?;
        for (choice, seed) in [(SampleChoice::First, 0), (SampleChoice::Random, 7)] {
            let chosen = choose_samples(all.len(), 3, choice, seed)?;
            same(&files.select(&chosen)?, &all.select(&chosen)?)?;
        }
    }
    // The first four are RGB; the grey ones alone have the channels of the whole folder.
    let grey = files.select(&[4, 11, 5])?;
    assert_eq!(grey.read_scaled([3, 3], 1)?.image_shape(), [3, 3, 3]);
    same(&grey, &all.select(&[4, 11, 5])?)?;
    // Without scaling they need not agree with those that are left out.
    assert_eq!(grey.read()?.image_shape(), [1, 4, 4]);
    assert!(matches!(files.read(), Err(Error::Differs { .. })));
    // A JPEG's header is read too.
    fs::remove_dir_all(folder.path().join("bag"))?;
    assert_eq!(read_image_folder_scaled(folder.path(), [3, 3], 1)?.image_shape(), [1, 3, 3]);
    for (name, channels) in [("grey.jpg", 1), ("progressive.jpg", 3), ("turned_6.jpg", 3)] {
        let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/pictures").join(name);
        fs::copy(picture, folder.path().join("coat/4.jpg"))?;
        let coats = ImageFolder::open(folder.path())?.select(&[0, 1])?;
        assert_eq!(coats.read_scaled([3, 3], 1)?.image_shape(), [channels, 3, 3], "{name}");
    }
    Ok(())
}

#[test]
fn files_that_are_left_out_are_not_read() -> TestResult {
    let folder = mixed_folder()?;
    written(&folder, "bag/2.png", b"not a picture");
    written(&folder, "bag/4.jpg", &[0xff, 0xd8, 0xff]);
    let files = ImageFolder::open(folder.path())?;
    assert!(matches!(files.read_scaled([4, 4], 2), Err(Error::Png { .. })));
    let left = files.without_classes(&["bag".to_owned()])?;
    assert_eq!(left.read()?.len(), 8);
    assert_eq!(left.read_scaled([4, 4], 2)?.image_shape(), [3, 4, 4]);
    assert_eq!(files.select(&[1, 0])?.read()?.len(), 2);
    assert!(matches!(files.select(&[0, 13]), Err(Error::Index { index: 13, len: 13 })));
    assert!(matches!(files.select(&[]), Err(Error::Invalid(_))));
    Ok(())
}

#[test]
fn a_random_order_keeps_samples_and_labels_together() -> TestResult {
    let pixels = Tensor::arange(64, (Kind::Uint8, tch::Device::Cpu)).view([64, 1, 1, 1]);
    let labels =
        Tensor::arange(64, (Kind::Int64, tch::Device::Cpu)).divide_scalar_mode(16, "floor");
    let sorted = ImageDataset::new(&pixels, Some(&labels.to_kind(Kind::Int64)))?;
    let shuffled = sorted.shuffled(3)?;
    assert_eq!(shuffled.pixels(), sorted.shuffled(3)?.pixels());
    assert_ne!(shuffled.pixels(), sorted.shuffled(4)?.pixels());
    let values = Vec::<i64>::try_from(shuffled.pixels().flatten(0, -1).to_kind(Kind::Int64))?;
    let own = Vec::<i64>::try_from(shuffled.labels().expect("they were given"))?;
    assert!(values.iter().zip(&own).all(|(value, label)| value / 16 == *label));
    assert_eq!(values.iter().collect::<HashSet<_>>().len(), 64);
    // The first quarter has every class, and not one alone.
    assert_eq!(own[..16].iter().collect::<HashSet<_>>().len(), 4, "{own:?}");
    Ok(())
}

/// As RGBA with an alpha of 255 everywhere, which many programs write.
#[test]
fn an_alpha_channel_that_hides_nothing_is_dropped() -> TestResult {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let opaque: Vec<u8> = (0..16).map(|byte| if byte % 4 == 3 { 255 } else { byte }).collect();
    write_png(&at("a.png"), (2, 2), png::ColorType::Rgba, &opaque);
    write_png(&at("b.png"), (2, 2), png::ColorType::Rgb, &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]);
    let images = read_image_folder(folder.path())?;
    assert_eq!(images.pixels().size(), [2, 3, 2, 2]);
    assert_eq!(images.pixels().get(0), images.pixels().get(1));

    // One pixel that is nearly opaque is transparent.
    let mut hides = opaque;
    hides[7] = 254;
    write_png(&at("a.png"), (2, 2), png::ColorType::Rgba, &hides);
    let message = read_image_folder(folder.path()).expect_err("one is transparent").to_string();
    assert!(message.contains("a.png") && message.contains("without transparency"), "{message}");
    Ok(())
}

#[test]
fn bad_pictures() -> TestResult {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let refused = || read_image_folder(folder.path()).expect_err("a bad picture").to_string();
    assert!(refused().contains("no file ending in .png"));
    assert!(matches!(read_image_folder(&at("absent")), Err(Error::Read { .. })));

    write_png(&at("a.png"), (2, 2), png::ColorType::Grayscale, &[0; 4]);
    write_png(&at("b.png"), (2, 3), png::ColorType::Grayscale, &[0; 6]);
    let message = refused();
    assert!(message.contains("b.png is grey, 2x3 pixels; expected grey, 2x2"), "{message}");
    write_png(&at("b.png"), (2, 2), png::ColorType::Rgb, &[0; 12]);
    assert!(refused().contains("b.png is RGB, 2x2 pixels; expected grey, 2x2"));
    write_png(&at("b.png"), (2, 2), png::ColorType::Rgba, &[0; 16]);
    assert!(refused().contains("b.png") && refused().contains("without transparency"));
    written(&folder, "b.png", b"not a picture");
    assert!(
        matches!(read_image_folder(folder.path()), Err(Error::Png { path, .. }) if path == at("b.png"))
    );
    let good = fs::read(at("a.png"))?;
    written(&folder, "b.png", &good[..good.len() - 20]);
    assert!(matches!(read_image_folder(folder.path()), Err(Error::Png { .. })));
    Ok(())
}
