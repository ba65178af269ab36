//! Files that are replaced in one step.

use ddil_files::{Error, write_atomic};

type TestResult = Result<(), Box<dyn std::error::Error>>;

#[test]
fn a_file_is_replaced_and_nothing_else_stays() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("status.json");
    for content in ["{}", "{\"step\": 3}"] {
        write_atomic(&path, content.as_bytes())?;
        assert_eq!(std::fs::read_to_string(&path)?, content);
    }
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}

/// A socket stands for the devices in `/dev`, which root could replace.
#[cfg(unix)]
#[test]
fn what_is_not_a_regular_file_is_not_replaced() -> TestResult {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&socket, &link)?;
    let inner = folder.path().join("folder");
    std::fs::create_dir(&inner)?;
    let entries = || std::fs::read_dir(folder.path()).map(Iterator::count);
    let before = entries()?;
    for path in [&socket, &link, &inner] {
        let kind = std::fs::symlink_metadata(path)?.file_type();
        let error = write_atomic(path, b"content").expect_err("it must stay");
        assert!(matches!(error, Error::Io { action: "replace", .. }), "{error:?}");
        assert!(ddil_files::with_causes(&error).contains("not a regular file"), "{error}");
        assert_eq!(std::fs::symlink_metadata(path)?.file_type(), kind);
    }
    assert_eq!(entries()?, before);
    Ok(())
}

/// Links stay, and the file that they lead to is written, whether it exists or not.
#[cfg(unix)]
#[test]
fn a_link_is_written_through() -> TestResult {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("below"))?;
    symlink("below/real", at("first"))?;
    symlink(at("first"), at("second"))?;
    for (link, content) in [("first", "a"), ("second", "b")] {
        write_atomic(&at(link), content.as_bytes())?;
        assert_eq!(std::fs::read_to_string(at("below/real"))?, content);
        assert!(std::fs::symlink_metadata(at(link))?.is_symlink());
    }
    assert_eq!(std::fs::read_dir(at("below"))?.count(), 1, "nothing else stays");
    symlink("circle", at("circle"))?;
    let error = write_atomic(&at("circle"), b"c").expect_err("it leads nowhere");
    assert!(ddil_files::with_causes(&error).contains("links lead from it"), "{error}");
    Ok(())
}
