//! `ClipTokenizer`.
