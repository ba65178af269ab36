//! `TensorBoard` event files: scalars and images, without TensorFlow or a protobuf compiler.
//!
//! A file is a sequence of `TFRecord`s (length, its masked CRC-32C, payload, its masked CRC-32C; little endian), each
//! with the protobuf message `tensorflow.Event`. The few fields written here have been stable since 2016.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use ddil_files::fault::{self, Point};
use ddil_pipelines::Image;

use crate::{Error, Result, crc32c};

/// The tag of a recorded figure. TensorBoard groups tags by the part before the first slash: `loss_forward` becomes
/// `loss/forward`, and `clipped_teacher_forward_749` becomes `clipped/teacher/forward_749`.
pub(crate) fn tag(figure: &str) -> String {
    match figure.split_once('_') {
        _ if ["grad_norm", "learning_rate"].contains(&figure) => format!("optimizer/{figure}"),
        Some(("clipped", rest)) => format!("clipped/{}", rest.replacen('_', "/", 1)),
        Some((group @ ("loss" | "share" | "critic" | "eval" | "conditioned"), rest)) => {
            format!("{group}/{rest}")
        }
        _ if figure == "loss" => "loss/total".to_owned(),
        _ => format!("figures/{figure}"),
    }
}

/// Writes one event file; `TensorBoard` reads all files of a folder together.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Creates an event file `events.out.tfevents.<seconds>.ddil` in a folder, which is created if necessary.
    ///
    /// `first_step` is the first step that will be written, one more than the last one done. `TensorBoard` drops that
    /// step and later ones of earlier files in the folder, so that the curves of a resumed run do not overlap.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file cannot be created.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        // TensorBoard reads files in the order of their names, and treats the last one as the live one.
        let path = folder.join(format!("events.out.tfevents.{:020.9}.ddil", since_epoch()));
        let file = fault::reach(Point::EventsCreate, &path)
            .and_then(|()| OpenOptions::new().write(true).create_new(true).open(&path));
        let file = BufWriter::new(file.map_err(Error::io("create", &path))?);
        let mut writer = Self { path, file };
        writer.event(0, &Message::default().bytes(event::FILE_VERSION, b"brain.Event:2"))?;
        let started = Message::default().varint(session_log::STATUS, session_log::START);
        writer.event(first_step, &Message::default().message(event::SESSION_LOG, &started))?;
        writer.flush()?;
        Ok(writer)
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds one point to the curve of a tag, such as `train/loss`.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the disk is full.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f32) -> Result<()> {
        self.summary(step, tag, |message| message.float(summary::SIMPLE_VALUE, value))
    }

    /// Adds an image to a tag, such as `samples`.
    ///
    /// # Errors
    ///
    /// [`Error::Pipelines`] if it cannot be encoded as PNG, [`Error::Files`] if the disk is full.
    pub fn image(&mut self, step: u64, tag: &str, image: &Image) -> Result<()> {
        let png = image.to_png()?;
        let image = Message::default()
            .varint(image::HEIGHT, image.height().into())
            .varint(image::WIDTH, image.width().into())
            .varint(image::COLORSPACE, image.channels() as u64)
            .bytes(image::ENCODED, &png);
        self.summary(step, tag, |message| message.message(summary::IMAGE, &image))
    }

    /// Flushes to the system; a reader that polls then sees everything.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the disk is full.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io("write", &self.path))
    }

    fn summary(
        &mut self,
        step: u64,
        tag: &str,
        value: impl FnOnce(Message) -> Message,
    ) -> Result<()> {
        let value = value(Message::default().bytes(summary::TAG, tag.as_bytes()));
        let summary = Message::default().message(summary::VALUE, &value);
        self.event(step, &Message::default().message(event::SUMMARY, &summary))
    }

    fn event(&mut self, step: u64, content: &Message) -> Result<()> {
        let header =
            Message::default().double(event::WALL_TIME, since_epoch()).varint(event::STEP, step);
        let record = framed(&[header.0, content.0.clone()].concat());
        fault::write_all(Point::EventsWrite, &self.path, &mut self.file, &record)
            .map_err(Error::io("write", &self.path))
    }
}

fn framed(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend(length);
    record.extend(crc32c::masked(&length).to_le_bytes());
    record.extend(payload);
    record.extend(crc32c::masked(payload).to_le_bytes());
    record
}

fn since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Field numbers of `tensorflow.Event`.
mod event {
    pub(super) const WALL_TIME: u64 = 1;
    pub(super) const STEP: u64 = 2;
    pub(super) const FILE_VERSION: u64 = 3;
    pub(super) const SUMMARY: u64 = 5;
    pub(super) const SESSION_LOG: u64 = 7;
}

/// Field numbers of `tensorflow.SessionLog`, and the status that makes a reader drop later steps.
mod session_log {
    pub(super) const STATUS: u64 = 1;
    pub(super) const START: u64 = 1;
}

/// Field numbers of `tensorflow.Summary` (the first) and of its values.
mod summary {
    pub(super) const VALUE: u64 = 1;
    pub(super) const TAG: u64 = 1;
    pub(super) const SIMPLE_VALUE: u64 = 2;
    pub(super) const IMAGE: u64 = 4;
}

/// Field numbers of `tensorflow.Summary.Image`.
mod image {
    pub(super) const HEIGHT: u64 = 1;
    pub(super) const WIDTH: u64 = 2;
    pub(super) const COLORSPACE: u64 = 3;
    pub(super) const ENCODED: u64 = 4;
}

/// A protobuf message under construction.
#[derive(Clone, Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(mut self, field: u64, value: u64) -> Self {
        self.push_varint(field << 3);
        self.push_varint(value);
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.push_varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.push_varint(field << 3 | 2);
        self.push_varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.push_varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn message(self, field: u64, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }

    fn push_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worked examples of the protobuf encoding guide.
    #[test]
    fn messages_are_encoded_as_the_guide_shows() {
        assert_eq!(Message::default().varint(1, 150).0, [0x08, 0x96, 0x01]);
        let testing = [0x12, 0x07, 0x74, 0x65, 0x73, 0x74, 0x69, 0x6e, 0x67];
        assert_eq!(Message::default().bytes(2, b"testing").0, testing);
    }
}
