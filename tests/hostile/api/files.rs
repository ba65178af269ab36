use ddil_files::{Invalid, open_plain_file, read_bounded, read_text_bounded};

use super::cases::{Cases, said};

#[test]
fn ddil_files() {
    let mut cases = Cases::default();
    reads(&mut cases);
    settings(&mut cases);
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
        cases.once("read_bounded", &what, || said(read_bounded(place, 100)));
        cases.once("open_plain_file", &what, || said(open_plain_file(place)));
        cases.once("read_text_bounded", &what, || said(read_text_bounded(place, 100)));
    }
    cases.once("read_bounded", "a byte too many", || said(read_bounded(&path, 63)));
    cases.once("read_bounded", "no limit", || said(read_bounded(&path, u64::MAX)));
}

fn settings(cases: &mut Cases) {
    for field in ["", ", ", "a.b", "a, b", "\u{0}"] {
        let invalid = || Invalid::new(field, f64::NAN, "");
        cases.once("Invalid::new", field, || said(Err::<(), _>(invalid())));
        cases.once("Invalid::under", field, || said(Err::<(), _>(invalid().under(field))));
    }
}
