//! The operations of a pickle, as far as libtorch allocates memory for them.

use std::fmt::{self, Display, Formatter};
use std::io::{self, BufRead, ErrorKind, Read};

/// The reason why a pickle is rejected.
#[derive(Debug)]
pub(super) enum Problem {
    /// An operation that does not occur in libtorch's pickles.
    Unknown { opcode: u8, at: u64 },
    /// A value's number skips earlier ones.
    Numbering { found: u32, expected: u32, at: u64 },
    /// It ends before its stop operation, or cannot be unpacked.
    Read { source: io::Error, at: u64 },
}

impl Display for Problem {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { opcode, at } => {
                write!(
                    f,
                    "its byte {at} is 0x{opcode:02x}, which is not an opcode of TorchScript's pickles"
                )
            }
            Self::Numbering { found, expected, at } => {
                write!(f, "its byte {at} stores memo entry {found}; expected at most {expected}")
            }
            Self::Read { source, at } if source.kind() == ErrorKind::UnexpectedEof => {
                write!(f, "the operation at byte {at} is truncated")
            }
            Self::Read { source, at } => write!(f, "it cannot be read after byte {at}: {source}"),
        }
    }
}

/// The data that follow an operation's code.
enum Argument {
    /// This many bytes.
    Bytes(u64),
    /// A length of four bytes, and that many bytes.
    Text,
    /// Two lines.
    Lines,
    /// The number under which a value is kept, in this many bytes.
    Put(usize),
    /// The end of the pickle.
    Stop,
}

/// Reads a pickle of protocol 2 to its end; the operations are those of libtorch's unpickler.
pub(super) fn ensure(pickle: impl BufRead) -> Result<(), Problem> {
    let mut pickle = Counted { inner: pickle, at: 0 };
    let mut kept = 0;
    loop {
        let at = pickle.at;
        let read = |source| Problem::Read { source, at };
        let [opcode] = pickle.array().map_err(read)?;
        let argument = argument(opcode).ok_or(Problem::Unknown { opcode, at })?;
        match argument {
            Argument::Stop => return Ok(()),
            Argument::Bytes(bytes) => pickle.skip(bytes).map_err(read)?,
            Argument::Text => {
                let bytes = pickle.array().map(u32::from_le_bytes).map_err(read)?;
                pickle.skip(bytes.into()).map_err(read)?;
            }
            Argument::Lines => {
                pickle.skip_line().and_then(|()| pickle.skip_line()).map_err(read)?;
            }
            Argument::Put(bytes) => {
                let found = pickle.number(bytes).map_err(read)?;
                // A gap would be filled, which takes 64 GiB for the largest number.
                if found > kept {
                    return Err(Problem::Numbering { found, expected: kept, at });
                }
                kept = kept.max(found.saturating_add(1));
            }
        }
    }
}

/// Operations of protocol 2, as listed in `pickletools`.
fn argument(opcode: u8) -> Option<Argument> {
    Some(match opcode {
        b'.' => Argument::Stop,
        b'('
        | b')'
        | b'N'
        | b'Q'
        | b'R'
        | b']'
        | b'a'
        | b'b'
        | b'd'
        | b'e'
        | b'l'
        | b's'
        | b't'
        | b'u'
        | b'}'
        | 0x81
        | 0x85..=0x89 => Argument::Bytes(0),
        b'K' | b'h' | 0x80 => Argument::Bytes(1),
        b'M' => Argument::Bytes(2),
        b'J' | b'j' => Argument::Bytes(4),
        b'G' => Argument::Bytes(8),
        // An integer of eight bytes, after those eight.
        0x8a => Argument::Bytes(9),
        b'X' => Argument::Text,
        b'c' => Argument::Lines,
        b'q' => Argument::Put(1),
        b'r' => Argument::Put(4),
        _ => return None,
    })
}

/// Counts the bytes read.
struct Counted<R> {
    inner: R,
    at: u64,
}

impl<R: BufRead> Counted<R> {
    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    /// A number of one or four bytes.
    fn number(&mut self, bytes: usize) -> io::Result<u32> {
        if bytes == 1 {
            return self.array::<1>().map(|[byte]| byte.into());
        }
        self.array().map(u32::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.inner.by_ref().take(bytes), &mut io::sink())?;
        self.at += skipped;
        if skipped == bytes { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        let skipped = self.inner.skip_until(b'\n')?;
        self.at += skipped as u64;
        if skipped == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}
