//! Printed commands that can be pasted into a shell.

use std::borrow::Cow;
use std::path::Path;

/// A path as one word of a POSIX shell: unchanged where that is safe, otherwise in single quotes.
pub(crate) fn quoted(path: &Path) -> Cow<'_, str> {
    let text = path.to_string_lossy();
    // A leading `-` is no matter of quotes: an option would be read.
    let text = if text.starts_with('-') { Cow::Owned(format!("./{text}")) } else { text };
    let is_safe = |c: char| c.is_alphanumeric() || "_-./+,:@%=".contains(c);
    if !text.is_empty() && text.chars().all(is_safe) {
        return text;
    }
    Cow::Owned(format!("'{}'", text.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_shell_reads_the_path_back() {
        for path in
            ["runs/a", "my data (1)", "é\\$x' #2", "a\"b", "*?[x]", "a\nb", "~", "a;b&c|d", "!1"]
        {
            let script = format!("printf %s {}", quoted(Path::new(path)));
            let output = Command::new("sh").args(["-c", &script]).output().expect("a shell");
            assert_eq!(String::from_utf8_lossy(&output.stdout), path);
        }
        assert_eq!(quoted(Path::new("runs/pd-ddil_2.0")), "runs/pd-ddil_2.0");
        assert_eq!(quoted(Path::new("-run")), "./-run");
    }
}
