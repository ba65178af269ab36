//! CLIP's tokenizer: from prompts to token ids of one length.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ddil_files::Invalid;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tch::Tensor;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, Encoding, ModelWrapper, SplitDelimiterBehavior, Tokenizer};

use crate::error::{BoxedError, Error, Result};

const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_FILE: &str = "special_tokens_map.json";
const ADDED_FILE: &str = "added_tokens.json";
const WHOLE_FILE: &str = "tokenizer.json";
const VOCAB_FILE: &str = "vocab.json";
const MERGES_FILE: &str = "merges.txt";

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// The suffix of the last token of a word.
const WORD_END: &str = "</w>";
/// CLIP's word pattern: special tokens, English endings, letters, single digits, runs of anything else.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Default number of tokens of a prompt, start and end included.
const MAX_LENGTH: usize = 77;
/// Size limit of a tokenizer file; CLIP's have up to four MiB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Length limit of a special token: the library needs many seconds for one of thousands of bytes.
const MAX_TOKEN_BYTES: usize = 512;
/// Larger numbers in files mean "no limit".
const LARGEST_MAX_LENGTH: f64 = 1e6;

/// Tokenized prompts for a text encoder.
#[derive(Debug)]
pub struct TokenizedPrompts {
    /// `[batch, max_length]`, `Int64`, on the CPU: the start token, the prompt, the end token, padding.
    pub input_ids: Tensor,
    /// `[batch, max_length]`, `Int64`, on the CPU: 0 for padding, 1 for everything else.
    pub attention_mask: Tensor,
    /// For each prompt that is too long, the part that was truncated, for a warning.
    pub truncated: Vec<Option<String>>,
}

/// CLIP's byte-level byte-pair encoding ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)), with the same tokens
/// as transformers' `CLIPTokenizer`.
///
/// A prompt is normalised to Unicode's composed form (NFC) and lower case, and every run of white space to one space.
/// HTML entities are kept. The names of special tokens are replaced by these tokens anywhere in a prompt. If `!` is the
/// padding token, as in Stable Diffusion XL's second encoder, this applies to every `!`, as in transformers.
///
/// # Example
///
/// ```no_run
/// use ddil_models::ClipTokenizer;
///
/// let tokenizer = ClipTokenizer::from_folder("stable-diffusion-v1-5/tokenizer")?;
/// let prompts = tokenizer.encode(&["a photo of a cat", ""])?;
/// assert_eq!(prompts.input_ids.size(), [2, 77]);
/// for cut in prompts.truncated.iter().flatten() {
///     eprintln!("the prompt is too long; this part of it is not used: {cut}");
/// }
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    start: i64,
    end: i64,
    padding: i64,
    max_length: usize,
}

impl ClipTokenizer {
    /// Loads a tokenizer from a transformers folder, such as `tokenizer` of a pipeline.
    ///
    /// The folder contains `tokenizer_config.json`, and either `tokenizer.json` or both `vocab.json` and `merges.txt`.
    /// `special_tokens_map.json` and `added_tokens.json`, which newer releases do not write, are read if they exist and
    /// the configuration has no `added_tokens_decoder`. No other files are read.
    ///
    /// # Errors
    ///
    /// [`Error::NoTokenizer`] with every file that is missing; [`Error::Read`], [`Error::InvalidJson`] and
    /// [`Error::InvalidTokenizer`] for an invalid file; [`Error::InvalidConfig`] with every special token
    /// that is not in the vocabulary or longer than 512 bytes.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        ensure_files(folder)?;
        let settings = Settings::read(folder)?;
        let whole = folder.join(WHOLE_FILE);
        let tokenizer = if whole.exists() {
            read_whole(&whole)?
        } else {
            let unknown = settings.marks.unk_token.as_ref().map_or(END, Mark::content);
            from_vocabulary(folder, unknown)?
        };
        settings.finish(tokenizer, folder)
    }

    /// Tokenizes prompts to one length: longer ones are truncated, shorter ones padded.
    ///
    /// The truncated part of a long prompt is returned with the tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenize`] for a text without tokens in the vocabulary, or to which the rules of the files cannot be
    /// applied; [`Error::Torch`] if memory does not suffice.
    pub fn encode(&self, prompts: &[&str]) -> Result<TokenizedPrompts> {
        const OP: &str = "ClipTokenizer::encode";
        let room = self.max_length - 2;
        let mut input_ids = Vec::with_capacity(prompts.len() * self.max_length);
        let mut attention_mask = Vec::with_capacity(input_ids.capacity());
        let mut truncated = Vec::with_capacity(prompts.len());
        for &prompt in prompts {
            let encoding = contained(|| self.tokenizer.encode(prompt, false))
                .map_err(|source| Error::Tokenize { op: OP, text: prompt.to_owned(), source })?;
            let ids = encoding.get_ids();
            let kept = ids.len().min(room);
            input_ids.push(self.start);
            input_ids.extend(ids[..kept].iter().copied().map(i64::from));
            input_ids.push(self.end);
            input_ids.extend(std::iter::repeat_n(self.padding, room - kept));
            attention_mask.extend((0..self.max_length).map(|i| i64::from(i < kept + 2)));
            truncated.push((ids.len() > room).then(|| text_from(prompt, &encoding, room)));
        }
        let size = [prompts.len() as i64, self.max_length as i64];
        let tensor = |values: &[i64]| {
            let tensor = Tensor::f_from_slice(values).and_then(|tensor| tensor.f_view(size));
            tensor.map_err(Error::torch(OP))
        };
        let (input_ids, attention_mask) = (tensor(&input_ids)?, tensor(&attention_mask)?);
        Ok(TokenizedPrompts { input_ids, attention_mask, truncated })
    }

    /// Tokens of every encoded prompt, start, end and padding included; 77 in all published tokenizers.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Number of tokens; a text encoder's `vocab_size` must not be smaller.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The start token.
    pub fn start_token(&self) -> i64 {
        self.start
    }

    /// The end token.
    pub fn end_token(&self) -> i64 {
        self.end
    }

    /// The padding token.
    pub fn padding_token(&self) -> i64 {
        self.padding
    }
}

/// The part of a prompt that starts at a token.
fn text_from(prompt: &str, encoding: &Encoding, token: usize) -> String {
    let start = encoding.get_offsets()[token].0;
    // A token can start within a character.
    let start = (0..=start.min(prompt.len())).rev().find(|&i| prompt.is_char_boundary(i));
    prompt[start.unwrap_or(0)..].to_owned()
}

/// A special token in a file: its text, or an object with flags.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, or an object with the text as `content`")]
enum Mark {
    Text(String),
    Flagged(Flagged),
}

#[derive(Clone, Debug, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the keys of the file")]
struct Flagged {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Mark {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) => content,
            Self::Flagged(flagged) => &flagged.content,
        }
    }

    fn token(&self, special: bool) -> AddedToken {
        let Self::Flagged(flagged) = self else {
            return AddedToken::from(self.content(), special);
        };
        let special = special || flagged.special;
        AddedToken::from(self.content(), special)
            .single_word(flagged.single_word)
            .lstrip(flagged.lstrip)
            .rstrip(flagged.rstrip)
            .normalized(flagged.normalized.unwrap_or(!special))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "the keys of the file")]
struct Marks {
    bos_token: Option<Mark>,
    eos_token: Option<Mark>,
    unk_token: Option<Mark>,
    pad_token: Option<Mark>,
}

/// The settings in the files other than the vocabulary.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    #[serde(flatten)]
    marks: Marks,
    model_max_length: Option<f64>,
    added_tokens_decoder: Option<BTreeMap<u32, Mark>>,
}

impl Settings {
    fn read(folder: &Path) -> Result<Self> {
        let mut settings: Self = read_json(&folder.join(CONFIG_FILE))?;
        if settings.added_tokens_decoder.is_some() {
            return Ok(settings);
        }
        let (special, added) = (folder.join(SPECIAL_FILE), folder.join(ADDED_FILE));
        if special.exists() {
            let marks: Marks = read_json(&special)?;
            let Marks { bos_token, eos_token, unk_token, pad_token } = settings.marks;
            settings.marks = Marks {
                bos_token: marks.bos_token.or(bos_token),
                eos_token: marks.eos_token.or(eos_token),
                unk_token: marks.unk_token.or(unk_token),
                pad_token: marks.pad_token.or(pad_token),
            };
        }
        if added.exists() {
            let tokens: BTreeMap<String, u32> = read_json(&added)?;
            let mark = |(content, id)| (id, Mark::Text(content));
            settings.added_tokens_decoder = Some(tokens.into_iter().map(mark).collect());
        }
        Ok(settings)
    }

    /// Adds the special tokens in the order of transformers, and looks up their ids.
    fn finish(self, mut tokenizer: Tokenizer, folder: &Path) -> Result<ClipTokenizer> {
        let mut problems = Vec::new();
        let Marks { bos_token, eos_token, unk_token, pad_token } = self.marks;
        let named = [
            ("bos_token", bos_token, START),
            ("eos_token", eos_token, END),
            ("unk_token", unk_token, END),
            ("pad_token", pad_token, END),
        ]
        .map(|(key, mark, default)| (key, mark.unwrap_or_else(|| Mark::Text(default.into()))));
        let added = self.added_tokens_decoder.iter().flatten();
        let added = added.map(|(_, mark)| ("added_tokens_decoder", mark.content()));
        ensure_short(
            named.iter().map(|(key, mark)| (*key, mark.content())).chain(added),
            &folder.join(CONFIG_FILE),
        )?;
        for (id, mark) in self.added_tokens_decoder.into_iter().flatten() {
            let special = named.iter().any(|(_, named)| named.content() == mark.content());
            add(&mut tokenizer, &mark, special);
            if tokenizer.token_to_id(mark.content()) != Some(id) {
                let expected = format!("the index of {:?}", mark.content());
                problems.push(Invalid::new("added_tokens_decoder", id, expected));
            }
        }
        let mut ids = [0; 4];
        for ((key, mark), id) in named.iter().zip(&mut ids) {
            match tokenizer.token_to_id(mark.content()) {
                Some(found) => *id = i64::from(found),
                None => problems.push(Invalid::new(
                    *key,
                    format!("{:?}", mark.content()),
                    "a token of the vocabulary",
                )),
            }
        }
        // If one token has two names, the flags under the last one apply.
        for (_, mark) in named.iter().rev() {
            add(&mut tokenizer, mark, true);
        }
        let max_length = match self.model_max_length {
            Some(length) if length < 3.0 => {
                problems.push(Invalid::new("model_max_length", length, "at least 3"));
                MAX_LENGTH
            }
            Some(length) if length < LARGEST_MAX_LENGTH => length as usize,
            _ => MAX_LENGTH,
        };
        if !problems.is_empty() {
            let what = folder.join(CONFIG_FILE).display().to_string();
            return Err(Error::InvalidConfig { what, problems });
        }
        let [start, end, _, padding] = ids;
        Ok(ClipTokenizer { tokenizer, start, end, padding, max_length })
    }
}

/// Adds a token unless one with that text exists.
fn add(tokenizer: &mut Tokenizer, mark: &Mark, special: bool) {
    if !tokenizer.get_added_vocabulary().get_vocab().contains_key(mark.content()) {
        tokenizer.add_tokens(&[mark.token(special)]);
    }
}

fn ensure_short<'a>(
    tokens: impl Iterator<Item = (&'static str, &'a str)>,
    place: &Path,
) -> Result<()> {
    let long = tokens.filter(|(_, content)| content.len() > MAX_TOKEN_BYTES);
    let expected = format!("at most {MAX_TOKEN_BYTES} bytes per token");
    let problems: Vec<_> = long
        .map(|(key, content)| {
            let found = format!("a token of {} bytes", content.len());
            Invalid::new(key, found, expected.clone())
        })
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::InvalidConfig { what: place.display().to_string(), problems })
}

fn ensure_files(folder: &Path) -> Result<()> {
    let absent = |file: &&'static str| !folder.join(file).exists();
    let mut missing: Vec<_> = [VOCAB_FILE, MERGES_FILE].into_iter().filter(absent).collect();
    if folder.join(WHOLE_FILE).exists() {
        missing.clear();
    }
    missing.extend(Some(CONFIG_FILE).filter(absent));
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::NoTokenizer { path: folder.into(), missing })
}

fn read_text(path: &Path) -> Result<String> {
    ddil_files::read_text_bounded(path, MAX_FILE_BYTES)
        .map_err(|source| Error::Read { path: path.into(), source: source.into() })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    ddil_files::parse_json(read_text(path)?.as_bytes())
        .map_err(|source| Error::InvalidJson { path: path.into(), source: source.into() })
}

/// The result of the library, with panics as errors: it panics for files whose parts do not match.
fn contained<T>(
    work: impl FnOnce() -> std::result::Result<T, BoxedError>,
) -> std::result::Result<T, BoxedError> {
    // No state that a panic could leave inconsistent is used afterwards.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text =
            text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(format!("the tokenizers library panicked: {text}").into())
    })
}

fn invalid(path: &Path, source: impl Into<BoxedError>) -> Error {
    Error::InvalidTokenizer { path: path.into(), source: source.into() }
}

/// A tokenizer from one file, without its truncation and padding: this module does both.
fn read_whole(path: &Path) -> Result<Tokenizer> {
    let parts: serde_json::Value = read_json(path)?;
    let added = parts["added_tokens"].as_array().into_iter().flatten();
    ensure_short(added.filter_map(|t| Some(("added_tokens", t["content"].as_str()?))), path)?;
    let text = read_text(path)?;
    let mut tokenizer: Tokenizer =
        contained(|| text.parse()).map_err(|source| invalid(path, source))?;
    let is_clip = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe)
        if bpe.end_of_word_suffix.as_deref() == Some(WORD_END));
    if !is_clip {
        let reason = format!("it is not a byte-pair encoding whose words end with {WORD_END}");
        return Err(invalid(path, reason));
    }
    tokenizer.with_truncation(None).map_err(|source| invalid(path, source))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// The tokenizer of CLIP's class from a vocabulary and merges.
fn from_vocabulary(folder: &Path, unknown: &str) -> Result<Tokenizer> {
    let (vocab_file, merges_file) = (folder.join(VOCAB_FILE), folder.join(MERGES_FILE));
    let vocab: BTreeMap<String, u32> = read_json(&vocab_file)?;
    if !vocab.contains_key(unknown) {
        return Err(invalid(&vocab_file, format!("it has no token {unknown:?} for unknown text")));
    }
    let merges = read_merges(&merges_file)?;
    let model = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .unk_token(unknown.to_owned())
        .end_of_word_suffix(WORD_END.to_owned())
        .build()
        .map_err(|source| invalid(&merges_file, source))?;
    let mut tokenizer = Tokenizer::new(model);
    let parts = || -> Result<_, BoxedError> {
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
        let words = SplitPattern::Regex(WORDS.into());
        Ok((spaces, Split::new(words, SplitDelimiterBehavior::Removed, true)?))
    };
    let (spaces, words) = parts().map_err(|source| invalid(&vocab_file, source))?;
    tokenizer.with_normalizer(Some(Normalizers::new(vec![
        NFC.into(),
        spaces.into(),
        Lowercase.into(),
    ])));
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    Ok(tokenizer)
}

/// Two tokens per line, the most frequent pair first.
fn read_merges(path: &Path) -> Result<Merges> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate();
    let merges = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with("#version"));
    let merge = |(i, line): (usize, &str)| match line.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left.to_owned(), right.to_owned()))
        }
        _ => Err(invalid(path, format!("line {} is {line:?}; expected two tokens", i + 1))),
    };
    merges.map(merge).collect()
}
