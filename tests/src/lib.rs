//! Shared helpers.

use ddil_models::{DownBlockType, UNet2DConfig, UpBlockType};

/// Copies a folder with its content; existing files are replaced.
///
/// # Errors
///
/// What the file system refuses.
pub fn copy_folder(from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let (path, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name())))?;
        if path.is_dir() {
            copy_folder(&path, &to)?;
        } else {
            std::fs::copy(&path, &to)?;
        }
    }
    Ok(())
}

/// A command that runs one test of this program again, in a process of its own that finds `folder` in the environment
/// variable `DDIL_TEST_CHILD`.
///
/// # Errors
///
/// What the system says of the program's own path.
pub fn child(test: &str, folder: &std::path::Path) -> std::io::Result<std::process::Command> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["--exact", test, "--nocapture"]).env("DDIL_TEST_CHILD", folder);
    Ok(command)
}

/// The folder that [`child`] names, in such a process.
pub fn folder_of_child() -> Option<std::path::PathBuf> {
    std::env::var_os("DDIL_TEST_CHILD").map(Into::into)
}

/// The words of a message that name types of Rust or of serde, which the author of a file need not know. Quoted parts, which
/// are the author's, do not count, nor do the terms of other formats: a string of JSON, a sequence of UTF-8.
///
/// # Example
///
/// ```
/// let words = ddil_tests::words_of_rust("invalid type: string \"a map\", expected struct `u32`");
/// assert_eq!(words, ["struct", "invalid type"]);
/// ```
pub fn words_of_rust(message: &str) -> Vec<&str> {
    const WORDS: &str = "struct enum tuple variant newtype untagged tagged sequence map Option Vec str bool boolean \
                         char identifier unit floating u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64";
    const PHRASES: [&str; 4] =
        ["invalid type", "invalid value", "expected a string", "missing field"];
    let outside: Vec<&str> =
        ["utf-8 sequence", "UTF-8 sequence"].iter().fold(vec![message], |parts, term| {
            parts.into_iter().flat_map(|part| part.split(term)).collect()
        });
    let outside = ['`', '"'].iter().fold(outside, |parts, quote| {
        parts.into_iter().flat_map(|part| part.split(*quote).step_by(2)).collect()
    });
    let words =
        outside.into_iter().flat_map(|part| part.split(|c: char| !c.is_alphanumeric() && c != '_'));
    let known = |word: &&str| WORDS.split_whitespace().any(|known| known == *word);
    let phrases = PHRASES.into_iter().filter(|phrase| message.contains(phrase));
    words.filter(known).chain(phrases).collect()
}

/// A network for grey pixels of any size and three classes with a null class, of a few thousand values.
pub fn small_unet() -> UNet2DConfig {
    UNet2DConfig {
        sample_size: None,
        in_channels: 1,
        out_channels: 1,
        down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
        up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
        block_out_channels: vec![8, 16],
        layers_per_block: 1,
        norm_num_groups: 4,
        num_class_embeds: Some(4),
        ..UNet2DConfig::default()
    }
}
