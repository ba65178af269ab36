use ddil_files::settings::{Settings, differences, inline_toml, parse_assignment, to_toml};
use ddil_files::{
    Invalid, JsonSettings, ensure_version, hex, listed, mistaken_content, open_regular_file,
    parent, parse_json, read_bounded, read_json, read_small_json, read_text_bounded,
    read_versioned, replaceable, sync_folder, temporary_sibling, write_atomic, write_json,
};
use serde_json::Value;

use super::cases::{Cases, outcome};

#[test]
fn ddil_files() {
    let mut cases = Cases::default();
    reads(&mut cases);
    settings(&mut cases);
    writes(&mut cases);
    toml_settings(&mut cases);
    json_settings(&mut cases);
    cases.finish("ddil-files");
}

fn reads(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bytes");
    std::fs::write(&path, [1_u8; 64]).expect("there is room");
    let empty = folder.path().join("empty");
    std::fs::write(&empty, []).expect("there is room");
    let places = [&path, &empty, &folder.path().to_owned(), &folder.path().join("none")];
    for place in places.into_iter().chain([&"/dev/zero".into(), &"nul\0byte".into()]) {
        let what = place.display().to_string();
        cases.once("read_bounded", &what, || outcome(read_bounded(place, 100)));
        cases.once("open_regular_file", &what, || outcome(open_regular_file(place)));
        cases.once("read_text_bounded", &what, || outcome(read_text_bounded(place, 100)));
    }
    cases.once("read_bounded", "a byte too many", || outcome(read_bounded(&path, 63)));
    cases.once("read_bounded", "no limit", || outcome(read_bounded(&path, u64::MAX)));
}

fn settings(cases: &mut Cases) {
    for bytes in [&[][..], &[0; 1000]] {
        cases.once("hex", &format!("{} bytes", bytes.len()), || {
            assert_eq!(hex(bytes).len(), 2 * bytes.len());
            Ok(())
        });
    }
    for count in [0, 1, 20, 21] {
        cases.once("listed", &format!("{count} names"), || {
            let text = listed(vec!["a\n\u{0}"; count]);
            assert_eq!(text.ends_with("more"), count > 20);
            Ok(())
        });
    }
    for field in ["", ", ", "a.b", "a, b", "\u{0}"] {
        let invalid = || Invalid::new(field, f64::NAN, "");
        cases.once("Invalid::new", field, || outcome(Err::<(), _>(invalid())));
        cases.once("Invalid::under", field, || outcome(Err::<(), _>(invalid().under(field))));
    }
}

/// Written files, in folders that exist or not, with valid and invalid names.
fn writes(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let there = folder.path().join("there.json");
    std::fs::write(&there, r#"{"format_version": 2}"#).expect("there is room");
    let places =
        [there, folder.path().to_owned(), folder.path().join("no/folder"), "".into(), "/".into()];
    for place in places.iter().chain([&"nul\0byte".into()]) {
        let what = place.display().to_string();
        cases.once("read_json", &what, || outcome(read_json::<Value>(place)));
        cases.once("read_small_json", &what, || outcome(read_small_json::<Value>(place)));
        cases.once("read_versioned", &what, || outcome(read_versioned::<Value>(place, 1)));
        cases.once("ensure_version", &what, || outcome(ensure_version(place, u32::MAX, 0)));
        cases.once("sync_folder", &what, || outcome(sync_folder(place)));
        cases.once("replaceable", &what, || outcome(replaceable(place)));
        cases.once("parent", &what, || outcome(Ok::<_, Invalid>(parent(place))));
        cases.once("temporary_sibling", &what, || {
            outcome(Ok::<_, Invalid>(temporary_sibling(place)))
        });
        cases.once("JsonSettings::from_file", &what, || outcome(JsonSettings::from_file(place)));
        cases.once("Settings::from_file", &what, || outcome(Settings::from_file(place)));
        // The root folder is not writable.
        if place.as_os_str() != "/" && !place.as_os_str().is_empty() {
            cases.once("write_json", &what, || outcome(write_json(place, &f64::NAN)));
            cases.once("write_atomic", &what, || outcome(write_atomic(place, b"content")));
        }
    }
    for text in [&b""[..], b"{", b"[1]", b"\xff", b"null"] {
        let what = format!("{text:?}");
        cases.once("mistaken_content", &what, || outcome(Ok::<_, Invalid>(mistaken_content(text))));
        cases.once("parse_json", &what, || outcome(parse_json::<f64>(text)));
    }
    cases.cannot_fail(&["Error::io", "Error::json", "with_causes", "causes", "in_json_terms"]);
    // Points at which tests have the disk fail.
    cases.cannot_fail(&["rename", "reach", "write_all"]);
}

fn toml_settings(cases: &mut Cases) {
    for text in ["", "a = 1", "a = [1, {b = 2}]", "a.b = 1\n[a]", "\u{0}", "a = "] {
        cases.once("Settings::parse", text, || outcome(Settings::parse("settings.toml", text)));
    }
    for key in ["", "a", "a.b", "\u{0}"] {
        cases.once("Settings::has", key, || {
            let _ = valid(Settings::parse("settings.toml", "a = 1")).has(key);
            Ok(())
        });
    }
    for assignment in ["", "=", "a", "a=", "a.=1", ".=1", "a.9.b=1", "a.0.b.c=1", "a=\u{0}"] {
        cases.once("parse_assignment", assignment, || outcome(parse_assignment(assignment)));
        cases.once("Settings::set", assignment, || {
            let mut settings = valid(Settings::parse("settings.toml", "a = [1, {b = 2}]"));
            outcome(settings.set(assignment))?;
            outcome(settings.build::<Value>())
        });
    }
    for value in [Value::Null, Value::from(u64::MAX), Value::from(f64::NAN), Value::from("text")] {
        let what = value.to_string();
        cases.once("to_toml", &what, || outcome(to_toml(&value)));
        cases.once("inline_toml", &what, || outcome(inline_toml(&value)));
        cases.once("differences", &what, || outcome(differences(&value, &Value::from(1))));
    }
}

fn json_settings(cases: &mut Cases) {
    let defaults = serde_json::json!({"a": 1, "b": [true]});
    let cut = "[".repeat(100_000);
    for text in ["", "{}", "[]", "null", r#"{"a": null, "": [], "_class_name": {}}"#, &cut] {
        let file = || JsonSettings::parse(text).map_err(|error| error.to_string());
        cases.once("JsonSettings::parse", text, || file().map(drop));
        cases.once("JsonSettings::class", text, || outcome(file()?.class(&[])));
        cases.once("JsonSettings::over", text, || outcome(file()?.over(&defaults)));
        cases.once("JsonSettings::problems", text, || {
            outcome(Ok::<_, Invalid>(file()?.problems(&defaults)))
        });
        cases.once("JsonSettings::unknown", text, || {
            outcome(Ok::<_, Invalid>(file()?.unknown(&defaults).len()))
        });
        cases.once("JsonSettings::with_class", text, || {
            outcome(Ok::<_, Invalid>(file()?.with_class("").without_unset(&["a", ""])))
        });
    }
    // A type that is not a JSON object is a fault of the program.
    cases.cannot_fail(&["JsonSettings::of", "JsonSettings::without_unset"]);
}

fn valid<T>(result: ddil_files::Result<T>) -> T {
    result.expect("the text is TOML")
}
