//! Row labels of a grid.

use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};

use super::{Image, Layout};
use crate::{Error, Result};

/// Font size in pixels.
const FONT_SIZE: f32 = 14.0;
/// Pixels of background to the left and right of a label.
const MARGIN: u32 = 6;

impl Image {
    /// Adds a margin with row labels to the left of a [`grid`](Self::grid) of the given layout. A row with an empty
    /// label gets none.
    ///
    /// `row_height` is the height of an image before enlargement.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] if the built-in font cannot be read.
    pub fn with_row_names(
        &self,
        names: &[String],
        row_height: u32,
        layout: Layout,
    ) -> Result<Self> {
        let font = FontRef::try_from_slice(dejavu::sans::regular()).map_err(|error| {
            Error::Image { found: error.to_string(), expected: "a readable font" }
        })?;
        let font = font.into_scaled(PxScale::from(FONT_SIZE));
        let width_of = |name: &String| -> f32 {
            name.chars().map(|letter| font.h_advance(font.glyph_id(letter))).sum()
        };
        let widest = names.iter().map(width_of).fold(0.0, f32::max);
        let margin = widest.ceil() as u32 + 2 * MARGIN;
        let mut wider =
            Self::filled(self.width + margin, self.height, self.channels, layout.background);
        wider.paste(self, margin, 0, 1);
        let enlarged = u64::from(row_height).saturating_mul(layout.scale.get().into());
        let gutter = u64::from(layout.gutter);
        let pitch = enlarged.saturating_add(gutter);
        for (row, name) in (0_u64..).zip(names) {
            let middle = row.saturating_mul(pitch).saturating_add(gutter + enlarged / 2);
            let right = (margin - MARGIN) as f32;
            let baseline = middle as f32 + f32::midpoint(font.ascent(), font.descent());
            wider.write(name, point(right - width_of(name), baseline), &font);
        }
        Ok(wider)
    }

    /// Draws black text; `from` is the start of its baseline.
    fn write<F: Font>(
        &mut self,
        text: &str,
        from: ab_glyph::Point,
        font: &ab_glyph::PxScaleFont<F>,
    ) {
        let mut x = from.x;
        for letter in text.chars() {
            let id = font.glyph_id(letter);
            let glyph = id.with_scale_and_position(FONT_SIZE, point(x, from.y));
            x += font.h_advance(id);
            let Some(outline) = font.outline_glyph(glyph) else { continue };
            let bounds = outline.px_bounds();
            outline.draw(|column, row, coverage| {
                let x = bounds.min.x as i64 + i64::from(column);
                let y = bounds.min.y as i64 + i64::from(row);
                self.darken(x, y, coverage);
            });
        }
    }

    fn darken(&mut self, x: i64, y: i64, coverage: f32) {
        let inside = |value: i64, end: u32| u32::try_from(value).ok().filter(|value| *value < end);
        let (Some(x), Some(y)) = (inside(x, self.width), inside(y, self.height)) else { return };
        let at = self.offset(x, y);
        for value in &mut self.pixels[at..at + self.channels] {
            *value = (f32::from(*value) * (1.0 - coverage.clamp(0.0, 1.0))).round() as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use tch::{Tensor, kind};

    use super::*;

    #[test]
    fn labels_are_left_of_their_rows_and_images_are_unchanged() -> Result<()> {
        let columns = NonZeroU32::new(3).unwrap_or(NonZeroU32::MIN);
        let layout = Layout::columns(columns);
        let images = Tensor::zeros([6, 3, 20, 20], kind::FLOAT_CPU);
        let grid = Image::grid(&images, layout)?;
        let names = ["circles".to_owned(), String::new()];
        let named = grid.with_row_names(&names, 20, layout)?;
        let margin = named.width - grid.width;
        assert!((40..80).contains(&margin) && named.height == grid.height, "{margin}");
        for y in 0..grid.height {
            for x in 0..grid.width {
                let (from, to) = (grid.offset(x, y), named.offset(margin + x, y));
                assert_eq!(grid.pixels[from..from + 3], named.pixels[to..to + 3]);
            }
        }
        let is_dark = |y: u32| (0..margin).any(|x| named.pixels[named.offset(x, y)] < 128);
        // Dark pixels in the middle of the first row, none beside the second.
        assert!(
            (8..18).any(is_dark)
                && !(0..5).any(is_dark)
                && !(23..46).any(|y| y < named.height && is_dark(y))
        );
        Ok(())
    }
}
