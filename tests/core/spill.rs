//! The part of a buffer that is on disk.

use std::fs;
use std::path::Path;

use ddil_core::{
    AggregationBuffer, BufferConfig, Conditioning, Error, Result, SavedFile, SavedState,
    SpillConfig, States, StorageKind,
};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tch::{Kind, Tensor};
use tempfile::TempDir;

use crate::buffer::{numbers, states};
use crate::common::trailing;

/// Five halves and a label.
const ROW_BYTES: u64 = 5 * 2 + 8;
const SHAPE: [i64; 1] = [5];
const HEAD_BYTES: u64 = 4096;

fn folder() -> TempDir {
    tempfile::tempdir().expect("there is room for a temporary folder")
}

/// `kept` states per ring in memory, `wanted` in total.
fn config(folder: &Path, kept: u64, wanted: usize) -> BufferConfig {
    let spill = SpillConfig::new(folder.join("spill"), 1 << 20);
    BufferConfig::default().with(|config| {
        config.capacity = 3 * wanted;
        config.byte_budget = 3 * kept * ROW_BYTES;
        config.spill = Some(spill);
    })
}

fn buffer(config: &BufferConfig) -> AggregationBuffer {
    AggregationBuffer::new(config.clone(), &trailing(4)).expect("it is valid")
}

/// A buffer of 4 states a ring in memory and 6 in files of one, where 50 a ring were put, five an update.
fn spilled(folder: &Path) -> Result<AggregationBuffer> {
    let mut buffer = buffer(&config(folder, 4, 10));
    for step in 0..10 {
        buffer.insert(&states(15 * step, step as u64, &[1, 2, 3].repeat(5), &SHAPE))?;
    }
    Ok(buffer)
}

fn files_in(folder: &Path) -> Vec<(String, u64)> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![] };
    let named = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.expect("it can be listed");
        let bytes = entry.metadata().expect("it can be looked at").len();
        (entry.file_name().to_string_lossy().into_owned(), bytes)
    };
    let mut files: Vec<_> = entries.map(named).collect();
    files.sort();
    files
}

/// As in a checkpoint: the files get separate names.
fn kept_aside(saved: SavedState, folder: &Path) -> SavedState {
    fs::create_dir_all(folder).expect("it can be made");
    let link = |file: SavedFile| {
        let path = folder.join(&file.name);
        file.link_to(&path).expect("it can be linked");
        SavedFile { path, ..file }
    };
    let files = saved.files.iter().cloned().map(link).collect();
    saved.with_files(files)
}

fn assert_same(a: &States, b: &States) {
    assert_eq!(a.x_t, b.x_t);
    assert_eq!(a.timesteps, b.timesteps);
    let [a_labels, b_labels] = [a, b].map(|s| s.conditioning.get(Conditioning::CLASS_LABELS));
    assert_eq!(a_labels, b_labels);
    assert_eq!((&a.created_at_step, &a.sources), (&b.created_at_step, &b.sources));
}

/// The same operations on two buffers, which must not differ.
#[derive(Clone, Debug)]
enum Act {
    Insert(Vec<usize>),
    Sample(Vec<usize>),
    /// Updates go by.
    Age(u64),
    Save,
    /// The process is killed, and the next one resumes from the last saved state.
    Resume,
    Flush,
}

fn any_act() -> impl Strategy<Value = Act> {
    let indices = |most| prop::collection::vec(1_usize..4, 1..most);
    prop_oneof![
        6 => indices(30).prop_map(Act::Insert),
        4 => indices(12).prop_map(Act::Sample),
        2 => (1_u64..3).prop_map(Act::Age),
        2 => Just(Act::Save),
        1 => Just(Act::Resume),
        1 => Just(Act::Flush),
    ]
}

/// A buffer that spills, and one that does not have to.
struct Pair {
    folder: TempDir,
    on_disk: AggregationBuffer,
    in_memory: AggregationBuffer,
    configs: [BufferConfig; 2],
    saved: Option<[SavedState; 2]>,
    step: u64,
    next: i64,
    saves: usize,
}

impl Pair {
    fn new(kept: u64, wanted: usize, max_age: u64) -> Self {
        let folder = folder();
        let on_disk = config(folder.path(), kept, wanted).with(|buffer| buffer.max_age = max_age);
        let in_memory = on_disk.clone().with(|config| {
            config.spill = None;
            config.byte_budget = 1 << 20;
        });
        let configs = [on_disk, in_memory];
        let [on_disk, in_memory] = [0, 1].map(|i| buffer(&configs[i]));
        Self { folder, on_disk, in_memory, configs, saved: None, step: 0, next: 0, saves: 0 }
    }

    fn act(&mut self, act: &Act) -> Result<()> {
        match act {
            Act::Insert(indices) => {
                let states = states(self.next, self.step, indices, &SHAPE);
                self.next += indices.len() as i64;
                self.on_disk.insert(&states)?;
                self.in_memory.insert(&states)?;
            }
            Act::Sample(indices) => self.sample(indices)?,
            Act::Age(updates) => self.step += updates,
            Act::Save => {
                let aside = self.folder.path().join(format!("save_{}", self.saves));
                self.saves += 1;
                let on_disk = kept_aside(self.on_disk.save()?, &aside);
                self.saved = Some([on_disk, self.in_memory.save()?]);
            }
            Act::Resume => self.resume()?,
            Act::Flush => {
                self.on_disk.flush();
                self.in_memory.flush();
            }
        }
        self.ensure_within_budgets();
        Ok(())
    }

    fn sample(&mut self, indices: &[usize]) -> Result<()> {
        let step = self.step;
        let there = |buffer: &mut AggregationBuffer| -> Vec<usize> {
            (1..4).map(|index| buffer.available(index, step)).collect()
        };
        let available = there(&mut self.on_disk);
        assert_eq!(available, there(&mut self.in_memory));
        let indices: Vec<usize> =
            indices.iter().copied().filter(|index| available[index - 1] > 0).collect();
        if indices.is_empty() {
            return Ok(());
        }
        let [mut a, mut b] = [0; 2].map(|_| StdRng::seed_from_u64(self.next as u64));
        let drawn = self.on_disk.sample(&indices, step, &mut a)?;
        assert_same(&drawn, &self.in_memory.sample(&indices, step, &mut b)?);
        assert_eq!(a, b);
        numbers(&drawn);
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        for (i, here) in [&mut self.on_disk, &mut self.in_memory].into_iter().enumerate() {
            // Its files are removed with it.
            here.flush();
            *here = buffer(&self.configs[i]);
            if let Some(saved) = &self.saved {
                here.restore(&saved[i])?;
            }
        }
        Ok(())
    }

    fn ensure_within_budgets(&self) {
        let statistics = self.on_disk.statistics(self.step);
        let spill = self.configs[0].spill.as_ref().expect("it was set");
        let on_disk: u64 = files_in(&spill.folder).iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(statistics.spilled_bytes, on_disk);
        assert!(on_disk <= spill.byte_budget);
        assert!(statistics.bytes <= self.configs[0].byte_budget);
        let expected = self.in_memory.statistics(self.step);
        assert_eq!((statistics.len, &statistics.per_index), (expected.len, &expected.per_index));
        assert_eq!(statistics.capacity, expected.capacity);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Same draws, same rows, for any operations in any order, also after resuming.
    #[test]
    fn is_what_a_buffer_in_memory_is(
        kept in 0_u64..6,
        spilled in 1_usize..20,
        max_age in 1_u64..8,
        acts in prop::collection::vec(any_act(), 1..40),
    ) {
        let mut pair = Pair::new(kept, kept as usize + spilled, max_age);
        for act in &acts {
            let done = pair.act(act);
            prop_assert!(done.is_ok(), "{act:?}: {done:?}");
        }
    }

    /// As many states as both budgets allow, and not a byte more.
    #[test]
    fn stays_within_both_budgets(byte_budget in 0_u64..400, on_disk in 24_700_u64..200_000) {
        let folder = folder();
        let spill = SpillConfig::new(folder.path().join("spill"), on_disk);
        let config = BufferConfig::default().with(|config| { config.capacity = 100_000; config.byte_budget = byte_budget; config.spill = Some(spill); });
        let mut buffer = buffer(&config);
        let mut most = 0;
        for step in 0..60 {
            let batch = states(300 * step, step as u64, &[1, 2, 3].repeat(100), &SHAPE);
            buffer.insert(&batch).expect("there is room");
            let statistics = buffer.statistics(step as u64);
            prop_assert!(statistics.bytes <= byte_budget);
            let found: u64 = files_in(&folder.path().join("spill")).iter().map(|f| f.1).sum();
            prop_assert_eq!(found, statistics.spilled_bytes);
            most = most.max(found);
        }
        prop_assert!(most <= on_disk, "{most} of {on_disk}");
        // Files come and go whole; what never fits is one of them and less than a row in each.
        prop_assert!(2 * most + 7 * ROW_BYTES >= on_disk, "{most} of {on_disk}");
        prop_assert_eq!(buffer.len(), buffer.statistics(0).capacity);
    }

    /// Any numbers are refused with a message, and no memory is allocated for them.
    #[test]
    fn damaged_metadata_are_refused(
        at in 0_usize..8,
        number in prop_oneof![Just(0_u64), Just(u64::MAX), Just(1 << 40), 1_u64..100],
    ) {
        let folder = folder();
        let original = spilled(folder.path()).expect("it is valid");
        let saved = original.save().expect("it can be saved");
        let mut metadata = saved.metadata.clone();
        let place: &mut Value = match at {
            0 => &mut metadata["ring_len"],
            1 => &mut metadata["spill"]["kept"],
            2 => &mut metadata["spill"]["segment_rows"],
            3 => &mut metadata["rings"][0]["next"],
            4 => &mut metadata["rings"][1]["items"][0]["count"],
            5 => &mut metadata["rings"][2]["items"][1]["birth"],
            6 => &mut metadata["timesteps"][0],
            _ => &mut metadata["rings"],
        };
        let before = std::mem::replace(place, json!(number));
        let same = before == json!(number);
        let other = self::folder();
        let mut restored = buffer(&config(other.path(), 4, 10));
        let saved = SavedState::new(saved.tensors, metadata).with_files(saved.files);
        let found = restored.restore(&saved);
        // A birth is any number, and fewer states than there were are a buffer, too.
        // A ring shifted by less than its four places in memory has the same files: only the checksum of a checkpoint's
        // folder detects that.
        let shifted = at == 3 && (50..54).contains(&number);
        let sound = same || at == 5 || (at == 4 && number < 5) || shifted;
        prop_assert!(found.is_err() || sound, "{number} for {before}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_changed_bit_is_detected(file in 0_usize..18, at in 0_usize..4114, bit in 0_u8..8) {
        let error = refusal(file, |path| change(path, |bytes| bytes[at] ^= 1 << bit));
        prop_assert!(matches!(error, Error::SavedFile { .. }), "{error}");
    }
}

#[test]
fn a_saved_buffer_is_not_changed_by_later_states() -> Result<()> {
    let folder = folder();
    let mut original = spilled(folder.path())?;
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let early = kept_aside(original.save()?, &first);
    let mut expected = Vec::new();
    let mut rng = StdRng::seed_from_u64(1);
    expected.push(original.sample(&[1, 2, 3].repeat(20), 9, &mut rng)?);
    for step in 10..13 {
        original.insert(&states(15 * step, step as u64, &[1, 2, 3].repeat(2), &SHAPE))?;
    }
    let late = kept_aside(original.save()?, &second);
    expected.push(original.sample(&[1, 2, 3].repeat(20), 12, &mut rng)?);
    // Everything that was there when they were saved is replaced by now.
    for step in 13..40 {
        original.insert(&states(15 * step, step as u64, &[1, 2, 3].repeat(5), &SHAPE))?;
    }
    let mut rng = StdRng::seed_from_u64(1);
    for (saved, expected) in [early, late].iter().zip(&expected) {
        // Saved twice, and the first continues: neither disturbs the other.
        for _ in 0..2 {
            let other = self::folder();
            let mut restored = buffer(&config(other.path(), 4, 10));
            restored.restore(saved)?;
            let drawn = restored.sample(&[1, 2, 3].repeat(20), 12, &mut rng.clone())?;
            assert_same(&drawn, expected);
            restored.insert(&states(9000, 12, &[1, 2, 3].repeat(9), &SHAPE))?;
        }
        for _ in 0..60 {
            rand::Rng::random_range(&mut rng, 0..10_usize);
        }
    }
    Ok(())
}

#[test]
fn files_come_with_the_first_spilled_state_and_go_with_the_buffer() -> Result<()> {
    let folder = folder();
    let config = config(folder.path(), 4, 10);
    let spill = folder.path().join("spill");
    let mut buffer = buffer(&config);
    buffer.insert(&states(0, 0, &[1, 1, 2, 2, 2, 2], &SHAPE))?;
    assert!(!spill.exists());
    buffer.insert(&states(6, 0, &[2, 2], &SHAPE))?;
    let expected = (HEAD_BYTES + ROW_BYTES) * 2;
    assert_eq!(files_in(&spill).iter().map(|f| f.1).sum::<u64>(), expected);
    assert_eq!(buffer.statistics(0).spilled_bytes, expected);
    buffer.flush();
    assert_eq!(files_in(&spill), []);
    buffer.insert(&states(0, 0, &[3; 5], &SHAPE))?;
    assert_eq!(files_in(&spill)[0].0, "ring_03_000000.rows");
    drop(buffer);
    assert_eq!(files_in(&spill), []);
    Ok(())
}

/// The format of version 1, which files of that version have for good.
#[test]
fn a_file_describes_its_contents() -> Result<()> {
    let folder = folder();
    let mut buffer = buffer(&config(folder.path(), 0, 14));
    buffer.insert(&states(7, 0, &[2, 2, 2], &SHAPE))?;
    let bytes = fs::read(folder.path().join("spill/ring_02_000001.rows")).expect("it is there");
    let head = "ddil buffer states\n{\"format_version\":1,\"grid_index\":2,\"segment\":1,\
                \"num_rows\":2,\"columns\":[{\"name\":\"x_t\",\"kind\":\"Half\",\"shape\":[5]},\
                {\"name\":\"class_labels\",\"kind\":\"Int64\",\"shape\":[]}]}\n";
    assert_eq!(String::from_utf8_lossy(&bytes[..head.len()]), head);
    assert!(bytes[head.len()..HEAD_BYTES as usize].iter().all(|byte| *byte == b' '));
    // 9 in half precision, and as a label.
    let mut row = [0x80, 0x48].repeat(5);
    row.extend(9_i64.to_le_bytes());
    assert_eq!(bytes[HEAD_BYTES as usize..][..row.len()], row);
    assert_eq!(bytes.len() as u64, HEAD_BYTES + 2 * ROW_BYTES);
    Ok(())
}

/// A saved buffer whose files are in another folder, and the error of restoring it after `damage` to one of the 18.
fn refusal(file: usize, damage: impl FnOnce(&Path)) -> Error {
    let folder = folder();
    let original = spilled(folder.path()).expect("it is valid");
    let aside = folder.path().join("aside");
    let saved = original.save().expect("it can be saved");
    fs::create_dir(&aside).expect("it can be made");
    // Copies: the original must stay as it is.
    let copy = |file: &SavedFile| {
        let path = aside.join(&file.name);
        fs::copy(&file.path, &path).expect("it can be copied");
        SavedFile { path, ..file.clone() }
    };
    let files = saved.files.iter().map(copy).collect();
    let saved = saved.with_files(files);
    let other = self::folder();
    let mut restored = buffer(&config(other.path(), 4, 10));
    restored.restore(&saved).expect("it is sound");
    drop(restored);
    damage(&aside.join(&saved.files[file].name));
    let mut restored = buffer(&config(other.path(), 4, 10));
    let refused = restored.restore(&saved).expect_err("it is damaged");
    drop(restored);
    assert_eq!(files_in(&other.path().join("spill")), [], "what was taken back is let go");
    refused
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("it is there");
    change(&mut bytes);
    fs::write(path, bytes).expect("it can be written");
}

#[test]
fn files_that_differ_from_the_saved_ones_are_refused_by_name() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("CRC-32", |path| change(path, |bytes| bytes[5000 - 896] ^= 1)),
        ("it has 4100 bytes of the", |path| change(path, |bytes| bytes.truncate(4100))),
        ("does not contain states of a buffer", |path| change(path, Vec::clear)),
        ("\"format_version\":2", |path| {
            change(path, |bytes| bytes[19 + 18] = b'2');
        }),
        ("\"segment\"", |path| {
            let other = files_in(path.parent().expect("it is in a folder"));
            let other = path.with_file_name(&other[2].0);
            fs::copy(other, path).expect("it can be copied");
        }),
        ("has 4115 bytes, not 4114", |path| change(path, |bytes| bytes.push(0))),
    ];
    for (words, damage) in damages {
        let error = refusal(1, damage).to_string();
        assert!(error.contains(words), "{words}: {error}");
        assert!(error.contains(".rows"), "{error}");
    }
    let gone = refusal(1, |path| fs::remove_file(path).expect("it is there"));
    assert!(matches!(gone, Error::Io { .. }), "{gone}");
}

#[test]
fn mismatches_are_refused() -> Result<()> {
    let folder = folder();
    let original = spilled(folder.path())?;
    let saved = original.save()?;
    let other = self::folder();
    let problem = |config: BufferConfig, saved: &SavedState| {
        buffer(&config).restore(saved).expect_err("it does not fit").to_string()
    };
    let own = config(other.path(), 4, 10);
    let in_memory = own.clone().with(|config| config.spill = None);
    assert!(problem(in_memory, &saved).contains("`buffer.spill` is not set"));
    let small = SpillConfig::new(other.path(), 10_000);
    let small = own.clone().with(|config| config.spill = Some(small));
    assert!(problem(small, &saved).contains("more than `buffer.spill.byte_budget` = 10000"));
    let files = saved.files[1..].to_vec();
    let missing = SavedState::new(vec![], saved.metadata.clone()).with_files(files);
    assert!(problem(own.clone(), &missing).contains("tensors are missing"));
    let single = own.with(|config| config.storage = StorageKind::F32);
    assert!(problem(single, &saved).contains("`x_t` has kind Half"));

    let nowhere =
        BufferConfig::default().with(|config| config.spill = Some(SpillConfig::default()));
    let nowhere = AggregationBuffer::new(nowhere, &trailing(4));
    assert!(
        matches!(nowhere, Err(Error::Invalid(invalid)) if invalid.field == "buffer.spill.folder")
    );
    let mut cramped = config(other.path(), 4, 10);
    cramped.spill.as_mut().expect("it is set").byte_budget = 24_683;
    let refused = buffer(&cramped).insert(&states(0, 0, &[1], &SHAPE));
    let refused = refused.expect_err("two files a ring are the least").to_string();
    assert!(refused.contains("at least 24684"), "{refused}");
    let mut told = states(0, 0, &[1; 9], &SHAPE);
    told.conditioning =
        Conditioning::class_labels(Tensor::zeros([9], (Kind::Bool, tch::Device::Cpu)));
    let refused = buffer(&config(other.path(), 4, 10)).insert(&told);
    assert!(matches!(refused, Err(Error::Conditioning { .. })), "{refused:?}");
    Ok(())
}

/// A failing disk is an error that names the folder, and the buffer continues once the disk works.
#[test]
fn a_disk_error_is_reported_and_survived() -> Result<()> {
    let folder = folder();
    let mut buffer = buffer(&config(folder.path(), 4, 10));
    buffer.insert(&states(0, 0, &[1; 5], &SHAPE))?;
    // A file of another's in the place of the third.
    let path = folder.path().join("spill/ring_01_000002.rows");
    fs::write(&path, "another's").expect("it can be written");
    let refused = buffer.insert(&states(5, 0, &[1; 4], &SHAPE)).expect_err("it is in the way");
    let Error::Spill { folder: named, source } = &refused else { panic!("{refused}") };
    assert_eq!(*named, folder.path().join("spill"));
    assert!(source.to_string().contains("ring_01_000002.rows"), "{source}");
    assert_eq!(fs::read_to_string(&path).expect("it is there"), "another's");
    let mut rng = StdRng::seed_from_u64(0);
    let drawn = buffer.sample(&[1; 40], 0, &mut rng)?;
    assert!(numbers(&drawn).iter().all(|number| (0..5).contains(number)));
    fs::remove_file(path).expect("it is there");
    buffer.insert(&states(20, 0, &[1; 4], &SHAPE))?;
    let mut drawn = numbers(&buffer.sample(&[1; 300], 0, &mut rng)?);
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!(drawn, [0, 1, 2, 3, 4, 20, 21, 22, 23]);

    // In a full ring, the states that were evicted are gone, and the rest remain.
    buffer.insert(&states(30, 0, &[2; 10], &SHAPE))?;
    let path = folder.path().join("spill/ring_02_000007.rows");
    fs::write(&path, "another's").expect("it can be written");
    assert!(buffer.insert(&states(40, 0, &[2; 7], &SHAPE)).is_err());
    let mut drawn = numbers(&buffer.sample(&[2; 100], 0, &mut rng)?);
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!(drawn, [37, 38, 39]);

    let spill = SpillConfig::new(folder.path().join("spill"), 1 << 20);
    spill.clear()?;
    assert_eq!(files_in(&spill.folder), []);
    fs::write(spill.folder.join("ring_of.rows"), "no name of ours").expect("it can be written");
    spill.clear()?;
    assert_eq!(files_in(&spill.folder).len(), 1);
    Ok(())
}

#[test]
fn any_rank_and_kind_can_be_spilled() -> Result<()> {
    for shape in crate::common::SHAPES {
        for storage in [StorageKind::F16, StorageKind::F32] {
            let folder = folder();
            let config = config(folder.path(), 0, 8).with(|buffer| {
                buffer.storage = storage;
                buffer.byte_budget = 0;
            });
            let mut buffer = buffer(&config);
            let given = states(3, 0, &[1, 3], &shape[1..]);
            buffer.insert(&given)?;
            let drawn = buffer.sample(&[3, 1], 0, &mut StdRng::seed_from_u64(0))?;
            assert_eq!(numbers(&drawn), [4, 3]);
            assert_eq!(drawn.x_t.size()[1..], shape[1..]);
            assert_eq!(drawn.x_t.kind() == Kind::Half, storage == StorageKind::F16);
        }
    }
    Ok(())
}
