//! CRC-32C (Castagnoli), used by `TFRecord` files and the record's positions.

/// The polynomial 0x1EDC6F41, bits reversed.
const POLYNOMIAL: u32 = 0x82F6_3B78;

static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ POLYNOMIAL } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
}

/// Extends `checksum` by `bytes`; start with 0.
pub(crate) fn extend(checksum: u32, bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!checksum, |value, &byte| (value >> 8) ^ TABLE[usize::from(value as u8 ^ byte)])
}

/// The masked checksum that `TFRecord` stores: rotated and offset, so that a checksum of data with checksums is useful.
pub(crate) fn masked(bytes: &[u8]) -> u32 {
    extend(0, bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4, and the check value of the CRC catalogue.
    #[test]
    fn agrees_with_published_values() {
        assert_eq!(extend(0, b"123456789"), 0xE306_9283);
        assert_eq!(extend(0, &[0; 32]), 0x8A91_36AA);
        assert_eq!(extend(0, &[0xFF; 32]), 0x62A8_AB43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(extend(0, &rising), 0x46DD_794E);
    }

    #[test]
    fn continues_where_it_stopped() {
        assert_eq!(extend(extend(0, b"12345"), b"6789"), extend(0, b"123456789"));
    }
}
