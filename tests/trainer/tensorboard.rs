use std::{collections::BTreeMap, fs};

use ddil_pipelines::Image;
use ddil_trainer::EventWriter;
use tch::Tensor;

use crate::TestResult;

/// The fields of a protobuf message: for each number its values, raw.
type Fields = BTreeMap<u64, Vec<Vec<u8>>>;

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (&byte, rest) = bytes.split_first().expect("a varint ends");
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(length);
    *bytes = rest;
    taken
}

fn parse(mut bytes: &[u8]) -> Fields {
    let mut fields = Fields::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let value = match tag & 7 {
            0 => varint(&mut bytes).to_le_bytes().to_vec(),
            1 => take(&mut bytes, 8).to_vec(),
            2 => {
                let length = varint(&mut bytes) as usize;
                take(&mut bytes, length).to_vec()
            }
            5 => take(&mut bytes, 4).to_vec(),
            wire_type => panic!("no such wire type: {wire_type}"),
        };
        fields.entry(tag >> 3).or_default().push(value);
    }
    fields
}

fn crc32c_masked(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// The events of a file, every checksum compared.
fn events(mut bytes: &[u8]) -> Vec<Fields> {
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let length = take(&mut bytes, 8);
        assert_eq!(number(take(&mut bytes, 4)), crc32c_masked(length));
        let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
        let payload = take(&mut bytes, length as usize);
        assert_eq!(number(take(&mut bytes, 4)), crc32c_masked(payload));
        events.push(parse(payload));
    }
    events
}

fn step(event: &Fields) -> u64 {
    u64::from_le_bytes(event[&2][0].as_slice().try_into().expect("eight bytes"))
}

#[test]
fn written_configs_read_back() -> TestResult {
    let folder = tempfile::tempdir()?;
    let mut writer = EventWriter::create(folder.path(), 41)?;
    writer.scalar(41, "train/loss", 0.25)?;
    writer.scalar(300, "train/lr", 1e-4)?;
    let images = Tensor::zeros([1, 3, 2, 5], tch::kind::FLOAT_CPU);
    let image = &Image::each(&images)?[0];
    writer.image(300, "samples", image)?;
    writer.flush()?;

    let name = writer.path().file_name().ok_or("a name")?.to_string_lossy().into_owned();
    assert!(name.starts_with("events.out.tfevents."), "{name}");
    let events = events(&fs::read(writer.path())?);
    assert_eq!(events.len(), 5);
    assert_eq!(events[0][&3], [b"brain.Event:2"]);
    // A session starts at step 41: values of older files from there on are discarded.
    assert_eq!((step(&events[1]), &parse(&events[1][&7][0])[&1][0][0]), (41, &1));

    let expected = [(41, "train/loss", 0.25_f32), (300, "train/lr", 1e-4)];
    for (event, (at, tag, value)) in events[2..4].iter().zip(expected) {
        let summary = parse(&parse(&event[&5][0])[&1][0]);
        assert_eq!((step(event), summary[&1][0].as_slice()), (at, tag.as_bytes()));
        assert_eq!(summary[&2][0], value.to_le_bytes());
        assert!(f64::from_le_bytes(event[&1][0].as_slice().try_into()?) > 1.7e9);
    }
    let summary = parse(&parse(&events[4][&5][0])[&1][0]);
    let event = parse(&summary[&4][0]);
    assert_eq!([event[&1][0][0], event[&2][0][0], event[&3][0][0]], [2, 5, 3]);
    assert_eq!(event[&4][0], image.to_png()?);
    Ok(())
}

#[test]
fn a_resumed_run_writes_a_new_file_that_sorts_last() -> TestResult {
    let folder = tempfile::tempdir()?;
    let first = EventWriter::create(folder.path(), 0)?.path().to_owned();
    std::thread::sleep(std::time::Duration::from_millis(2));
    let second = EventWriter::create(folder.path(), 10)?.path().to_owned();
    assert!(first < second);
    Ok(())
}
