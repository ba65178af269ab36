use std::io::Write as _;
use std::path::Path;

use ddil_libtorch::{Error, ensure_script_archive};
use flate2::{Compression, write::DeflateEncoder};

/// As `torch.jit.save` wrote it.
fn saved() -> Vec<u8> {
    let path = "golden/models/torch_script/model.pt";
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("a golden")
}

/// The error for an archive; none if it is accepted.
fn refusal_of(archive: &[u8]) -> Option<String> {
    let file = tempfile::NamedTempFile::new().expect("there is room");
    std::fs::write(file.path(), archive).expect("there is room");
    match ensure_script_archive(file.path()) {
        Ok(()) => None,
        Err(error @ Error::ScriptArchive { .. }) => Some(error.to_string()),
        Err(error) => panic!("{error:?}"),
    }
}

#[track_caller]
fn assert_refused(archive: &[u8], words: &[&str]) {
    let refusal_of = refusal_of(archive).expect("it should be refused");
    for word in words {
        assert!(refusal_of.contains(word), "`{word}` is not said in: {refusal_of}");
    }
}

/// A hand-made record of an archive, whose header can contain anything.
#[derive(Clone)]
struct Record {
    name: &'static str,
    method: u16,
    data: Vec<u8>,
    bytes: u64,
    unpacked_bytes: u64,
    /// The position in its header; none for the correct one.
    header: Option<u64>,
    /// Sizes and place are in the extra field, where 64 bits are.
    is_large: bool,
}

fn plain(name: &'static str, data: &[u8]) -> Record {
    let bytes = data.len() as u64;
    Record {
        name,
        method: 0,
        data: data.to_vec(),
        bytes,
        unpacked_bytes: bytes,
        header: None,
        is_large: false,
    }
}

fn packed(name: &'static str, data: &[u8]) -> Record {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(data).expect("memory");
    let unpacked_bytes = data.len() as u64;
    let content = encoder.finish().expect("memory");
    Record { method: 8, unpacked_bytes, ..plain(name, &content) }
}

fn large(record: Record) -> Record {
    Record { is_large: true, ..record }
}

impl Record {
    fn local(&self) -> Vec<u8> {
        let mut header = b"PK\x03\x04".to_vec();
        header.extend([0; 22]);
        header.extend((self.name.len() as u16).to_le_bytes());
        header.extend([0; 2]);
        [&header[..], self.name.as_bytes(), &self.data].concat()
    }

    fn entry(&self, at: u64) -> Vec<u8> {
        let numbers = [self.unpacked_bytes, self.bytes, self.header.unwrap_or(at)];
        let [unpacked, bytes, header] =
            numbers.map(|n| if self.is_large { u32::MAX } else { n as u32 }.to_le_bytes());
        let field: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        // A padding field precedes the field that matters.
        let extra = [&b"FB\x01\x00Z\x01\x00\x18\x00"[..], &field].concat();
        let extra = if self.is_large { &extra[..] } else { &[] };
        let lengths = [self.name.len(), extra.len(), 0].map(|n| (n as u16).to_le_bytes()).concat();
        let mut entry = b"PK\x01\x02\0\0\0\0\0\0".to_vec();
        entry.extend(self.method.to_le_bytes());
        entry.extend([0; 8]);
        entry.extend([&bytes[..], &unpacked, &lengths, &[0; 8], &header].concat());
        [&entry[..], self.name.as_bytes(), extra].concat()
    }
}

/// An archive of records, and where its directory starts.
fn archive(records: &[Record]) -> (Vec<u8>, usize) {
    let (mut all, mut list) = (Vec::new(), Vec::new());
    for record in records {
        list.extend(record.entry(all.len() as u64));
        all.extend(record.local());
    }
    let start = all.len();
    all.extend(&list);
    all.extend(b"PK\x05\x06\0\0\0\0");
    all.extend([(records.len() as u16).to_le_bytes(); 2].concat());
    all.extend([list.len() as u32, start as u32].map(u32::to_le_bytes).concat());
    all.extend([0; 2]);
    (all, start)
}

fn of(record: Record) -> Vec<u8> {
    archive(&[plain("a/version", b"3\n"), record]).0
}

#[test]
fn the_saved_export_is_used() {
    assert_eq!(refusal_of(&saved()), None);
    let text = vec![b'x'; 100_000];
    for record in [plain("a/data/0", &text), packed("a/code/b.py", &text)] {
        assert_eq!(refusal_of(&of(record.clone())), None);
        assert_eq!(refusal_of(&of(large(record))), None);
    }
    // A comment of maximum length follows the end record.
    let mut commented = of(plain("a/data/0", &text));
    let len = commented.len();
    commented[len - 2..].copy_from_slice(&[0xff; 2]);
    commented.extend(vec![b'.'; 65535]);
    assert_eq!(refusal_of(&commented), None);
}

/// Wherever it is cut, and whichever byte is another: refused or taken, in no time and without a panic.
#[test]
fn every_cut_and_every_byte() {
    let pickle = b"\x80\x02X\x03\0\0\0abcq\0cmodule\nname\nq\x01.".as_slice();
    let whole = of(large(packed("a/data.pkl", pickle)));
    assert_eq!(refusal_of(&whole), None);
    for len in 0..whole.len() {
        let refusal_of = refusal_of(&whole[..len]).expect("the end is missing");
        assert!(refusal_of.contains("its end is missing"), "{refusal_of}");
    }
    for at in 0..whole.len() {
        for change in [1, 0x80] {
            let mut other = whole.clone();
            other[at] ^= change;
            let _ = refusal_of(&other);
        }
    }
}

/// libtorch takes memory for each of these sizes before it looks whether there is so much.
#[test]
fn sizes_beyond_the_file_are_refused() {
    let valid = plain("a/data/0", &[7; 100]);
    let cases: [(Record, &[&str]); 6] = [
        (Record { bytes: 1 << 31, unpacked_bytes: 1 << 31, ..valid.clone() }, &["2147483648"]),
        (
            Record { bytes: 1 << 40, unpacked_bytes: 1 << 40, is_large: true, ..valid.clone() },
            &["1099511627776"],
        ),
        (
            Record { bytes: u64::MAX, unpacked_bytes: u64::MAX, is_large: true, ..valid.clone() },
            &["18446744073709551615"],
        ),
        (Record { unpacked_bytes: 1 << 31, ..valid.clone() }, &["2147483648", "not compressed"]),
        (Record { header: Some(u64::MAX - 10), is_large: true, ..valid.clone() }, &["file ends"]),
        (Record { header: Some(3), ..valid }, &["not at byte 3"]),
    ];
    for (record, words) in cases {
        let words = [&["\"a/data/0\""], words].concat();
        assert_refused(&of(record), &words);
    }
    // It starts inside the file and ends beyond it, though not because of its size alone.
    let mut last = plain("a/data/1", &[7; 10]);
    (last.bytes, last.unpacked_bytes) = (150, 150);
    assert_refused(&archive(&[plain("a/data/0", &[7; 10]), last]).0, &["150 bytes", "file ends"]);
}

/// A thousand records that are one and the same would be read a thousand times.
#[test]
fn records_do_not_share_their_bytes() {
    let mut records = vec![plain("a/data/0", &[7; 10_000])];
    let again =
        Record { bytes: 10_000, unpacked_bytes: 10_000, header: Some(0), ..plain("a/data/1", &[]) };
    records.resize(20, again);
    assert_refused(&archive(&records).0, &["\"a/data/1\"", "the file has"]);
}

#[test]
fn compressed_data_have_a_limit() {
    let valid = packed("a/code/b.py", &vec![b' '; 100_000]);
    let bomb = Record { unpacked_bytes: (128 << 20) + 1, ..valid.clone() };
    assert_refused(&of(bomb), &["\"a/code/b.py\"", "134217728", "134217729"]);
    // Not because of a single record.
    let half = Record { unpacked_bytes: 64 << 20, ..valid.clone() };
    assert_eq!(refusal_of(&of(half.clone())), None);
    assert_refused(&archive(&[half.clone(), half, valid.clone()]).0, &["134317728"]);
    assert_refused(&of(Record { method: 12, ..valid }), &["\"a/code/b.py\"", "method 12"]);
}

#[test]
fn a_list_of_records_lies_within_the_file() {
    let (archive, start) = archive(&[plain("a/data/0", &[7; 100])]);
    let end = archive.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut other = archive.clone();
        other[at..at + bytes.len()].copy_from_slice(bytes);
        other
    };
    assert_refused(&with(end + 12, &[0xff; 4]), &["4294967295"]);
    assert_refused(&with(end + 16, &[0xff; 4]), &["4294967295"]);
    assert_refused(&with(end + 10, &[0xff; 2]), &["65535 entries"]);
    assert_refused(&with(end + 10, &[0; 2]), &["0 entries"]);
    assert_refused(&with(start, b"XX"), &["entry 0"]);
    // Name, extra field and comment beyond the list.
    for at in [28, 30, 32] {
        assert_refused(&with(start + at, &[0xff; 2]), &["entry 0"]);
    }
    // Only an empty file and a short one have no place for an end.
    assert_refused(&[], &["not a zip archive"]);
    assert_refused(&archive[end + 1..], &["not a zip archive"]);
}

/// Of two ends the last one counts, and a large archive has its numbers elsewhere.
#[test]
fn the_end_that_libtorch_reads_is_the_one_that_is_checked() {
    let mut two = of(plain("a/data/0", b"good"));
    let bad = Record { bytes: 1 << 31, unpacked_bytes: 1 << 31, ..plain("a/data/0", b"bad") };
    two.extend(of(bad));
    assert_refused(&two, &[]);

    let (mut archive, start) = archive(&[plain("a/data/0", &[7; 100])]);
    let end = archive.split_off(archive.len() - 22);
    let list_bytes = (archive.len() - start) as u64;
    let large_end = |list_bytes: u64, num_records: u64| {
        let numbers = [num_records, num_records, list_bytes, start as u64].map(u64::to_le_bytes);
        let record = [b"PK\x06\x06\x2c\0\0\0\0\0\0\0".as_slice(), &[0; 12], &numbers.concat()];
        let place = (archive.len() as u64).to_le_bytes();
        let locator = [b"PK\x06\x07\0\0\0\0".as_slice(), &place, &[1, 0, 0, 0]];
        [&archive[..], &record.concat(), &locator.concat(), &end].concat()
    };
    let valid = large_end(list_bytes, 1);
    assert_eq!(refusal_of(&valid), None);
    assert_refused(&large_end(1 << 40, 1), &["1099511627776"]);
    assert_refused(&large_end(u64::MAX, 1), &["18446744073709551615"]);
    assert_refused(&large_end(list_bytes, 1 << 40), &["1099511627776 entries"]);
    let mut lost = valid;
    let at = lost.len() - 22 - 20 + 8;
    lost[at..at + 8].fill(0xff);
    assert_refused(&lost, &["zip64"]);
}

/// A text of 4 GiB in four bytes, and a value with the last of all numbers, for which the others would be made.
#[test]
fn pickles_claim_no_more_than_is_in_them() {
    let valid = b"\x80\x02X\x03\0\0\0abcq\0cmodule\nname\nq\x01K\x07h\0h\x01.".as_slice();
    let long = b"\x80\x02X\xff\xff\xff\x06abcq\0.".as_slice();
    let numbered = b"\x80\x02Nq\0Nr\xff\xff\xff\xff.".as_slice();
    let gap = b"\x80\x02Nq\0Nq\x02.".as_slice();
    let unknown = b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.".as_slice();
    let endless = b"\x80\x02N".as_slice();
    let lines = b"\x80\x02cmodule\n".as_slice();
    // The case of letters does not matter to libtorch.
    for name in ["a/data.pkl", "a/DATA.PKL", "a/code/b.py.debug_pkl"] {
        for record in [plain, packed] {
            assert_eq!(refusal_of(&of(record(name, valid))), None);
            let refused = |pickle, words: &[&str]| {
                assert_refused(&of(record(name, pickle)), &[&[name], words].concat());
            };
            refused(long, &["byte 2 is truncated"]);
            refused(numbered, &["byte 6", "4294967295", "at most 1"]);
            refused(gap, &["byte 6", "stores memo entry 2"]);
            refused(unknown, &["byte 2 is 0x8d"]);
            refused(endless, &["byte 3 is truncated"]);
            refused(lines, &["byte 2 is truncated"]);
        }
    }
    // Only pickles are looked into.
    assert_eq!(refusal_of(&of(plain("a/data/0", long))), None);
    let damaged = Record { data: vec![0xff; 20], bytes: 20, ..packed("a/data.pkl", valid) };
    assert_refused(&of(damaged), &["a/data.pkl", "cannot be read"]);
}

#[test]
fn only_plain_files_are_opened() {
    for place in ["/dev/zero", "/", "nowhere.pt"] {
        let error = ensure_script_archive(place).expect_err("no file");
        let named = matches!(&error, Error::File { path, .. } if path == Path::new(place));
        assert!(named, "{error:?}");
    }
}
