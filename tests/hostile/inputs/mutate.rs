//! Corrupts files with knowledge of their format.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Map, Number, Value, json};

use super::tree::Tree;

/// Corrupts one thing in a folder: mostly inside a file, sometimes the files themselves.
pub(crate) fn corrupt(tree: &mut Tree, rng: &mut StdRng) {
    let names: Vec<String> = tree.files.keys().cloned().collect();
    let Some(name) = names.choose(rng) else { return };
    match rng.random_range(0..20) {
        0 => drop(tree.files.remove(name)),
        1 => drop(tree.files.insert(name.clone(), Vec::new())),
        2 => {
            let other = names.choose(rng).unwrap_or(name);
            let content = tree.files[other].clone();
            tree.files.insert(name.clone(), content);
        }
        _ => {
            let content = &tree.files[name];
            let corrupted = corrupted(name, content, rng).unwrap_or_else(|| bytes(content, rng));
            tree.files.insert(name.clone(), corrupted);
        }
    }
}

/// A file corrupted within its format; none if it has no known format, or in some cases, in which it is corrupted byte
/// by byte.
fn corrupted(name: &str, content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    if rng.random_range(0..5) == 0 {
        return None;
    }
    match name.rsplit('.').next()? {
        "json" => json_text(content, rng),
        "jsonl" => lines(content, rng),
        "toml" => toml_text(content, rng),
        "safetensors" => safetensors(content, rng),
        "png" => png(content, rng),
        "gz" => gzip(content, rng),
        "idx" => idx(content, rng),
        "txt" => text_lines(content, rng),
        "pt" => zip(content, rng),
        "jpg" => jpeg(content, rng),
        "csv" => table(content, rng),
        "rows" => rows(content, rng),
        _ => None,
    }
}

/// Bits turned, bytes taken out, put in, doubled; the end cut off.
fn bytes(content: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut content = content.to_vec();
    let at = rng.random_range(0..=content.len());
    let end = (at + rng.random_range(0..64)).min(content.len());
    match rng.random_range(0..6) {
        0 => content.truncate(at),
        1 => drop(content.drain(at..end)),
        2 => {
            let again = content[at..end].to_vec();
            content.splice(at..at, again);
        }
        3 => {
            let new: Vec<u8> = (0..rng.random_range(1..16)).map(|_| rng.random()).collect();
            content.splice(at..at, new);
        }
        4 => {
            let extreme = *[0, 0xff, 0x7f, 0x80].choose(rng).unwrap_or(&0);
            content[at..end].fill(extreme);
        }
        _ => {
            if let Some(byte) = content.get_mut(at) {
                *byte ^= 1 << rng.random_range(0..8);
            }
        }
    }
    content
}

/// Values that programs seldom think of.
fn odd(rng: &mut StdRng) -> Value {
    let mut nested = json!(0);
    for _ in 0..rng.random_range(2..300) {
        nested = json!([nested]);
    }
    let values = [
        Value::Null,
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(1_u64 << 31),
        json!(u32::MAX),
        json!(1_u64 << 40),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(-0.0),
        json!(1e308),
        json!(5e-324),
        json!(""),
        json!("../../outside"),
        json!("/etc/passwd"),
        json!("nul\0byte"),
        json!("\u{202e}\u{1f600}"),
        json!("x".repeat(5000)),
        json!([]),
        json!({}),
        json!(vec![1; 300]),
        json!(vec![u32::MAX; 8]),
        nested,
    ];
    values.choose(rng).cloned().unwrap_or_default()
}

/// Changes one place of a value.
pub(crate) fn value(value: &mut Value, rng: &mut StdRng) {
    let count = count(value);
    let mut place = rng.random_range(0..count);
    let donor = nth(value, &mut rng.random_range(0..count)).cloned().unwrap_or_default();
    if let Some(target) = nth_mut(value, &mut place) {
        change(target, donor, rng);
    }
}

fn change(target: &mut Value, donor: Value, rng: &mut StdRng) {
    match (rng.random_range(0..8), &mut *target) {
        (0, Value::Object(object)) => rename(object, rng),
        (1, Value::Object(object)) => {
            let keys: Vec<String> = object.keys().cloned().collect();
            if let Some(key) = keys.choose(rng) {
                object.remove(key);
            }
        }
        (2, Value::Object(object)) => drop(object.insert("surplus".to_owned(), odd(rng))),
        (0, Value::Array(items)) => drop(items.pop()),
        (1, Value::Array(items)) => items.push(donor),
        (2, Value::Array(items)) if !items.is_empty() && items.len() < 1000 => {
            *items = (0..5).flat_map(|_| items.clone()).collect();
        }
        (0..4, Value::Number(number)) => *number = other_number(number, rng),
        (0..2, Value::String(text)) => *text = other_text(text, rng),
        (4 | 5, _) => *target = donor,
        _ => *target = odd(rng),
    }
}

fn rename(object: &mut Map<String, Value>, rng: &mut StdRng) {
    let keys: Vec<String> = object.keys().cloned().collect();
    let Some(key) = keys.choose(rng) else { return };
    let other = keys.choose(rng).unwrap_or(key).clone();
    let new = match rng.random_range(0..4) {
        0 => format!("{key}x"),
        1 => format!("../{key}"),
        2 => String::new(),
        _ => other,
    };
    if let Some(value) = object.remove(key) {
        object.insert(new, value);
    }
}

fn other_number(number: &Number, rng: &mut StdRng) -> Number {
    let factor = *[-1, 2, 3, 10, 1000, 1_000_000, 1 << 20].choose(rng).unwrap_or(&2);
    if let Some(whole) = number.as_i64() {
        return if rng.random() {
            whole.saturating_mul(factor).into()
        } else {
            whole.saturating_add(rng.random_range(-2..=2)).into()
        };
    }
    let scaled = number.as_f64().map(|value| value * factor as f64);
    scaled.and_then(Number::from_f64).unwrap_or_else(|| 0.into())
}

fn other_text(text: &str, rng: &mut StdRng) -> String {
    match rng.random_range(0..5) {
        0 => text.to_uppercase(),
        1 => format!("{text}/../{text}"),
        2 => text.chars().rev().collect(),
        3 => text.chars().skip(1).collect(),
        _ => text.repeat(3),
    }
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Object(object) => object.values().collect(),
        Value::Array(items) => items.iter().collect(),
        _ => Vec::new(),
    }
}

fn count(value: &Value) -> usize {
    1 + children(value).into_iter().map(count).sum::<usize>()
}

fn nth<'a>(value: &'a Value, place: &mut usize) -> Option<&'a Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    children(value).into_iter().find_map(|child| nth(child, place))
}

fn nth_mut<'a>(value: &'a mut Value, place: &mut usize) -> Option<&'a mut Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    let children: Vec<&mut Value> = match value {
        Value::Object(object) => object.values_mut().collect(),
        Value::Array(items) => items.iter_mut().collect(),
        _ => return None,
    };
    children.into_iter().find_map(|child| nth_mut(child, place))
}

fn json_text(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut parsed: Value = serde_json::from_slice(content).ok()?;
    value(&mut parsed, rng);
    let text = parsed.to_string();
    // A duplicate key is not part of a value.
    if rng.random_range(0..12) == 0 {
        let mut keys = text.match_indices(':').map(|(at, _)| at);
        if let Some(at) = keys.next()
            && let Some(key) = text.get(1..at)
        {
            return Some(format!("{{{key}:null,{}", &text[1..]).into_bytes());
        }
    }
    Some(text.into_bytes())
}

fn toml_text(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content).ok()?;
    let table: toml::Table = text.parse().ok()?;
    let mut parsed = serde_json::to_value(table).ok()?;
    value(&mut parsed, rng);
    // Values that TOML cannot represent, such as null, are left to other inputs.
    Some(toml::to_string(&parsed).ok()?.into_bytes())
}

fn lines(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content).ok()?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        return None;
    }
    let at = rng.random_range(0..lines.len());
    match rng.random_range(0..4) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[at].clone()),
        _ => {
            let mut parsed: Value = serde_json::from_str(&lines[at]).ok()?;
            value(&mut parsed, rng);
            lines[at] = parsed.to_string();
        }
    }
    Some((lines.join("\n") + "\n").into_bytes())
}

fn text_lines(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content).ok()?;
    let mut lines: Vec<&str> = text.lines().collect();
    if lines.is_empty() {
        return None;
    }
    let at = rng.random_range(0..lines.len());
    match rng.random_range(0..4) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[rng.random_range(0..lines.len())]),
        2 => lines[at] = "",
        _ => lines[at] = "one two three \u{1f600}",
    }
    Some(lines.join("\n").into_bytes())
}

/// The header as JSON, changed and put back, mostly with its right length.
fn safetensors(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let length = u64::from_le_bytes(content.get(..8)?.try_into().ok()?);
    let end = 8_usize.checked_add(usize::try_from(length).ok()?)?;
    let (header, data) = (content.get(8..end)?, content.get(end..)?);
    let mut parsed: Value = serde_json::from_slice(header).ok()?;
    match rng.random_range(0..6) {
        // Shape and offsets that go together and with nothing else.
        0 => {
            if let Some(object) = parsed.as_object_mut() {
                let end = 1_u64 << rng.random_range(20..62);
                let entry = json!({"dtype": "U8", "shape": [end], "data_offsets": [0, end]});
                object.insert("huge".to_owned(), entry);
            }
        }
        1 => dtype(&mut parsed, rng),
        _ => value(&mut parsed, rng),
    }
    let header = parsed.to_string().into_bytes();
    let length = match rng.random_range(0..8) {
        0 => [0, 1, 1 << 40, u64::MAX, header.len() as u64 + 8].choose(rng).copied()?,
        _ => header.len() as u64,
    };
    Some([&length.to_le_bytes()[..], &header, data].concat())
}

fn dtype(header: &mut Value, rng: &mut StdRng) {
    let kinds = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "U64"];
    let Some(object) = header.as_object_mut() else { return };
    let names: Vec<String> = object.keys().cloned().collect();
    if let Some(entry) = names.choose(rng).and_then(|name| object.get_mut(name))
        && let Some(dtype) = entry.get_mut("dtype")
    {
        *dtype = json!(kinds.choose(rng).unwrap_or(&"F32"));
    }
}

/// A chunk changed, with its checksum made right.
fn png(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut corrupted = content.get(..8)?.to_vec();
    let mut chunks = Vec::new();
    let mut rest = content.get(8..)?;
    while let Some(length) = rest.get(..4) {
        let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
        chunks.push(rest.get(4..8 + length)?.to_vec());
        rest = rest.get(12 + length..)?;
    }
    if chunks.is_empty() {
        return None;
    }
    let at = rng.random_range(0..chunks.len());
    match rng.random_range(0..6) {
        0 => drop(chunks.remove(at)),
        1 => chunks.insert(at, chunks[at].clone()),
        // Width and height of the first chunk.
        2 | 3 => {
            let size: [u32; 2] = std::array::from_fn(|_| 1 << rng.random_range(0..32));
            chunks
                .first_mut()?
                .get_mut(4..12)?
                .copy_from_slice(&size.map(u32::to_be_bytes).concat());
        }
        _ => {
            let body = bytes(&chunks[at][4..], rng);
            chunks[at].truncate(4);
            chunks[at].extend(body);
        }
    }
    for chunk in chunks {
        let mut crc = flate2::Crc::new();
        crc.update(&chunk);
        corrupted.extend((chunk.len() as u32 - 4).to_be_bytes());
        corrupted.extend(&chunk);
        corrupted.extend(crc.sum().to_be_bytes());
    }
    Some(corrupted)
}

/// Unpacked, corrupted, packed again; or a bomb: sixteen MiB of zeros in sixteen KiB.
fn gzip(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    use std::io::{Read, Write};
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(content).read_to_end(&mut unpacked).ok()?;
    let mut corrupted = idx(&unpacked, rng).unwrap_or_else(|| bytes(&unpacked, rng));
    if rng.random_range(0..6) == 0 {
        corrupted.resize(1 << 24, 0);
    }
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&corrupted).ok()?;
    packed.finish().ok()
}

/// A segment of a JPEG, or the pixels behind the last of them.
fn jpeg(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut corrupted = content.get(..2)?.to_vec();
    let mut segments = Vec::new();
    let mut rest = content.get(2..)?;
    // Up to the first scan, behind which there are pixels and, of a progressive one, more segments.
    while segments.last().is_none_or(|segment: &Vec<u8>| segment[1] != 0xda) {
        let length = usize::from(u16::from_be_bytes(rest.get(2..4)?.try_into().ok()?));
        segments.push(rest.get(..2 + length)?.to_vec());
        rest = rest.get(2 + length..)?;
    }
    let mut rest = rest.to_vec();
    let at = rng.random_range(0..segments.len());
    match rng.random_range(0..8) {
        0 => drop(segments.remove(at)),
        1 => segments.insert(at, segments[rng.random_range(0..segments.len())].clone()),
        2 => rest = rest.repeat(rng.random_range(0..30)),
        3 => rest = bytes(&rest, rng),
        // Height, width, number of components and how they are sampled.
        4 | 5 => {
            let frame = segments.iter_mut().find(|segment| matches!(segment[1], 0xc0..=0xc2))?;
            let place = *[5, 7, 9, 11, 14].choose(rng)?;
            let odd: u16 = *[0, 1, 0x0101, 0x1144, 1 << 12, 1 << 14, 0x7fff, 0xffff].choose(rng)?;
            frame.get_mut(place..place + 2)?.copy_from_slice(&odd.to_be_bytes());
        }
        _ => {
            let body = bytes(&segments[at][4..], rng);
            segments[at].truncate(4);
            segments[at].extend(body);
        }
    }
    for mut segment in segments {
        let length = (segment.len() - 2) as u16;
        segment[2..4].copy_from_slice(&length.to_be_bytes());
        corrupted.extend(segment);
    }
    corrupted.extend(rest);
    Some(corrupted)
}

/// A field, a row or a column of a table, mostly with quotes where they belong.
fn table(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content).ok()?;
    let mut rows: Vec<Vec<String>> =
        text.lines().map(|line| line.split(',').map(str::to_owned).collect()).collect();
    let row = rng.random_range(0..rows.len().max(1));
    let column = rng.random_range(0..rows.get(row)?.len());
    let odd =
        ["", "\"", "\"\"", "\"a\nb\"", "a\"b", "../../outside", "/etc/passwd", "\0", "\u{1f600}"];
    match rng.random_range(0..8) {
        0 => drop(rows.remove(row)),
        1 => rows.insert(row, rows[rng.random_range(0..rows.len())].clone()),
        2 => {
            let other = rows[0].choose(rng).cloned().unwrap_or_default();
            rows[row].insert(column, other);
        }
        3 => drop(rows[row].remove(column)),
        4 => rows.iter_mut().for_each(|row| row.reverse()),
        5 => rows[row] = vec![rows[row][column].clone(); 3000],
        _ => (*odd.choose(rng)?).clone_into(&mut rows[row][column]),
    }
    let rows: Vec<String> = rows.iter().map(|row| row.join(",")).collect();
    Some((rows.join("\n") + "\n").into_bytes())
}

/// The header of a file of spilled states, in its fixed size, or the length of the file.
fn rows(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut corrupted = content.to_vec();
    let start = content.iter().position(|&byte| byte == b'\n')? + 1;
    let end = start + content.get(start..4096)?.iter().position(|&byte| byte == b'\n')?;
    match rng.random_range(0..4) {
        0 => corrupted.resize(*[0, 4095, 4096, 4097, content.len() + 1, 1 << 20].choose(rng)?, 0),
        1 => *corrupted.get_mut(rng.random_range(0..start))? ^= 1,
        _ => {
            let head = json_text(&content[start..end], rng)?;
            let room = corrupted.get_mut(start..4096)?;
            room.fill(b' ');
            let len = head.len().min(room.len());
            room[..len].copy_from_slice(&head[..len]);
        }
    }
    Some(corrupted)
}

/// One of the numbers in one of the headers of a zip archive; libtorch does not look at the checksums.
fn zip(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    /// Where a number is, and of how many bytes.
    type Place = (usize, usize);
    let headers: [(&[u8; 4], &[Place]); 5] = [
        (b"PK\x01\x02", &[(10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)]),
        (b"PK\x03\x04", &[(8, 2), (18, 4), (22, 4), (26, 2), (28, 2)]),
        (b"PK\x05\x06", &[(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)]),
        (b"PK\x06\x06", &[(4, 8), (24, 8), (32, 8), (40, 8), (48, 8)]),
        (b"PK\x06\x07", &[(8, 8), (16, 4)]),
    ];
    let (signature, numbers) = headers.choose(rng)?;
    let places: Vec<usize> =
        (0..content.len()).filter(|&at| content[at..].starts_with(*signature)).collect();
    let (offset, len) = *numbers.choose(rng)?;
    let at = places.choose(rng)? + offset;
    let odd: u64 = *[0, 1, 8, 1 << 15, 1 << 31, u32::MAX.into(), 1 << 40, u64::MAX].choose(rng)?;
    let mut corrupted = content.to_vec();
    corrupted.get_mut(at..at + len)?.copy_from_slice(&odd.to_le_bytes()[..len]);
    Some(corrupted)
}

/// One of the numbers in the header.
fn idx(content: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut corrupted = content.to_vec();
    let at = 4 * rng.random_range(0..4);
    let number: u32 = *[0, 1, 0x803, 0x801, 0x80b, 1 << 16, 1 << 31, u32::MAX].choose(rng)?;
    corrupted.get_mut(at..at + 4)?.copy_from_slice(&number.to_be_bytes());
    Some(corrupted)
}
