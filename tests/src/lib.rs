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
