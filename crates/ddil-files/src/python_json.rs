//! JSON as Python and Windows' programs write it.

use std::borrow::Cow;

/// The words that Python writes for numbers that are not finite. They are not JSON.
const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];

/// The bytes of a text without the mark of UTF-8 at its start, which editors of Windows write.
pub(crate) fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text)
}

/// The text with quotes around Python's words for numbers that are not finite.
pub(crate) fn with_quoted_words(json: &[u8]) -> Cow<'_, [u8]> {
    let (mut quoted, mut kept) = (Vec::new(), 0);
    let (mut at, mut in_text) = (0, false);
    while let Some(&byte) = json.get(at) {
        let word = WORDS.iter().find(|word| !in_text && json[at..].starts_with(word));
        if let Some(word) = word {
            quoted.extend_from_slice(&json[kept..at]);
            quoted.push(b'"');
            quoted.extend_from_slice(word);
            quoted.push(b'"');
            at += word.len();
            kept = at;
            continue;
        }
        match byte {
            b'"' => in_text = !in_text,
            // An escaped quote does not end a text.
            b'\\' if in_text => at += 1,
            _ => {}
        }
        at += 1;
    }
    if kept == 0 {
        return Cow::Borrowed(json);
    }
    quoted.extend_from_slice(&json[kept..]);
    Cow::Owned(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_outside_of_texts_are_quoted() {
        let quoted = |json: &str| {
            String::from_utf8(with_quoted_words(json.as_bytes()).into_owned()).expect("text")
        };
        assert_eq!(
            quoted(r#"{"a": -Infinity, "b": [NaN,1]}"#),
            r#"{"a": "-Infinity", "b": ["NaN",1]}"#
        );
        for same in [r#"{"a": "NaN \" Infinity"}"#, r#""\\", "\"#, "", "\"NaN", r#"{"NaN": 1}"#] {
            assert_eq!(quoted(same), same);
        }
        assert_eq!(quoted(r#"["\\", NaN]"#), r#"["\\", "NaN"]"#);
    }
}
