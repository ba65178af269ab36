//! A vocabulary for CLIP's tokenizer, learned from texts.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::Result;

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Suffix of the last symbol of a word.
const WORD_END: &str = "</w>";

/// The tokens of byte-pair encoding ([Sennrich et al. 2015](https://arxiv.org/abs/1508.07909)) as in CLIP: the 256
/// bytes, the same at the end of a word, merges of frequent pairs, and the marks of start and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    merges: Vec<(String, String)>,
}

impl Vocabulary {
    /// Merges the most frequent pair of neighbours repeatedly until every word of the texts is one token.
    ///
    /// Of equally frequent pairs the first in lexicographic order is merged.
    ///
    /// # Errors
    ///
    /// A text with characters other than ASCII: their bytes would have to be mapped to symbols.
    pub fn learn<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut words: BTreeMap<Vec<String>, usize> = BTreeMap::new();
        for text in texts {
            if !text.is_ascii() {
                return Err(format!("{text:?} contains characters beyond ASCII").into());
            }
            for word in words_of(&text.to_lowercase()) {
                *words.entry(spelt(word)).or_default() += 1;
            }
        }
        let mut merges = Vec::new();
        while let Some(pair) = most_frequent_pair(&words) {
            let joined = words.into_iter().map(|(word, count)| (join(word, &pair), count));
            words = joined.collect();
            merges.push(pair);
        }
        Ok(Self { merges })
    }

    /// All tokens; the index of a token is its number.
    pub fn tokens(&self) -> Vec<String> {
        let bytes = byte_symbols();
        let ends = bytes.iter().map(|symbol| format!("{symbol}{WORD_END}"));
        let bytes = bytes.iter().map(char::to_string);
        let merged = self.merges.iter().map(|(left, right)| format!("{left}{right}"));
        let marks = [START, END].map(str::to_owned);
        bytes.chain(ends).chain(merged).chain(marks).collect()
    }

    /// Number of tokens; the last but one is the start mark, the last the end mark.
    pub fn len(&self) -> u32 {
        2 * 256 + self.merges.len() as u32 + 2
    }

    /// Whether there are no tokens, which is never the case.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Writes the files that transformers' `CLIPTokenizer` reads, for prompts of up to `max_length` tokens.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub fn write(&self, folder: &Path, max_length: u32) -> Result<()> {
        fs::create_dir_all(folder)?;
        let tokens: BTreeMap<String, usize> = self.tokens().into_iter().zip(0..).collect();
        fs::write(folder.join("vocab.json"), serde_json::to_string(&tokens)?)?;
        let mut merges = "#version: 0.2\n".to_owned();
        for (left, right) in &self.merges {
            writeln!(merges, "{left} {right}")?;
        }
        fs::write(folder.join("merges.txt"), merges)?;

        let mark = |content: &str, pretty: bool| {
            let mut mark = json!({
                "content": content, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false,
            });
            if !pretty {
                mark["__type"] = "AddedToken".into();
            }
            mark
        };
        let special = |plain| {
            json!({
                "bos_token": mark(START, plain), "eos_token": mark(END, plain), "unk_token": mark(END, plain),
                "pad_token": END,
            })
        };
        let mut config = special(false);
        config["add_prefix_space"] = false.into();
        config["do_lower_case"] = true.into();
        config["errors"] = "replace".into();
        config["model_max_length"] = max_length.into();
        config["tokenizer_class"] = "CLIPTokenizer".into();
        for (name, value) in
            [("tokenizer_config.json", config), ("special_tokens_map.json", special(true))]
        {
            fs::write(folder.join(name), serde_json::to_string_pretty(&value)? + "\n")?;
        }
        Ok(())
    }
}

/// Splits a text into words as CLIP does: runs of letters, single digits, runs of anything else except spaces.
fn words_of(text: &str) -> Vec<&str> {
    let kind = |letter: char| match letter {
        letter if letter.is_ascii_alphabetic() => 0,
        letter if letter.is_ascii_digit() => 1,
        _ => 2,
    };
    let mut words = Vec::new();
    for part in text.split_ascii_whitespace() {
        let mut start = 0;
        for (i, pair) in part.as_bytes().windows(2).enumerate() {
            let [left, right] = [pair[0], pair[1]].map(|byte| kind(char::from(byte)));
            if left != right || right == 1 {
                words.push(&part[start..=i]);
                start = i + 1;
            }
        }
        words.push(&part[start..]);
    }
    words
}

/// The symbols of a word. Printable ASCII stands for itself.
fn spelt(word: &str) -> Vec<String> {
    let mut symbols: Vec<String> = word.chars().map(String::from).collect();
    if let Some(last) = symbols.last_mut() {
        *last += WORD_END;
    }
    symbols
}

fn most_frequent_pair(words: &BTreeMap<Vec<String>, usize>) -> Option<(String, String)> {
    let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
    for (word, count) in words {
        for pair in word.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += count;
        }
    }
    let better = |(left, n): &((&str, &str), usize), (right, m): &((&str, &str), usize)| {
        n.cmp(m).then_with(|| right.cmp(left))
    };
    let (left, right) = counts.into_iter().max_by(better)?.0;
    Some((left.to_owned(), right.to_owned()))
}

/// The word with every occurrence of the pair merged to one symbol.
fn join(word: Vec<String>, (left, right): &(String, String)) -> Vec<String> {
    let mut joined: Vec<String> = Vec::with_capacity(word.len());
    let mut open = false;
    for symbol in word {
        let left_half = joined.last_mut().filter(|last| open && *last == left);
        // A merged symbol cannot be the left half of another merge.
        open = if let Some(last) = left_half.filter(|_| symbol == *right) {
            last.push_str(&symbol);
            false
        } else {
            joined.push(symbol);
            true
        };
    }
    joined
}

/// The characters that stand for the bytes, in CLIP's order: the printable ones, then the rest.
fn byte_symbols() -> Vec<char> {
    let printable = || (33..=126).chain(161..=172).chain(174..=255_u32);
    let others = 256 - printable().count() as u32;
    printable().chain(256..256 + others).filter_map(char::from_u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_as_clip_cuts_them() {
        assert_eq!(
            words_of("a t-shirt, 12 of b2b: --"),
            ["a", "t", "-", "shirt", ",", "1", "2", "of", "b", "2", "b", ":", "--"]
        );
        assert!(words_of("  ").is_empty());
    }

    #[test]
    fn the_most_frequent_pair_is_joined_first() {
        let vocabulary = Vocabulary::learn(["ab ab ab", "cb cb", "aaaa"]).expect("ASCII");
        let pairs: Vec<String> =
            vocabulary.merges.iter().map(|(left, right)| format!("{left}+{right}")).collect();
        // a + b</w> three times; a + a and c + b</w> twice; then the remainder of aaaa.
        assert_eq!(pairs, ["a+b</w>", "a+a", "c+b</w>", "a+a</w>", "aa+aa</w>"]);
    }

    #[test]
    fn every_byte_has_a_token_of_its_own() {
        let vocabulary = Vocabulary::learn(["a bag"]).expect("ASCII");
        let mut tokens = vocabulary.tokens();
        assert_eq!(tokens.len(), vocabulary.len() as usize);
        assert_eq!(tokens[0], "!");
        assert_eq!(tokens[512..], ["ag</w>", "bag</w>", START, END]);
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), vocabulary.len() as usize);
        assert!(Vocabulary::learn(["caf\u{e9}"]).is_err());
    }
}
