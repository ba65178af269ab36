//! Memory of a U-Net's activations, by the shapes of its weights.

use std::collections::BTreeMap;

/// Size and precision of a forward pass of a U-Net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassShape {
    /// Samples per call.
    pub batch: u64,
    /// Height and width of a sample.
    pub size: [u64; 2],
    /// Tokens of a text, for networks with text conditioning.
    pub tokens: u64,
    /// Bytes per value computed by convolutions, matrix products and attention: 2 under autocast to half precision.
    pub computed_bytes: u64,
    /// Bytes per value computed by norms and the activations after them: 4 on CUDA, where autocast keeps them in single
    /// precision; on the CPU equal to the others.
    pub normed_bytes: u64,
    /// Whether a group norm and the activation after it store no intermediate result: channels last on the CPU
    /// ([`ddil_libtorch::group_norm`]).
    pub fused_norms: bool,
    /// Whether the backward pass recomputes the intermediate results of blocks.
    pub checkpointing: bool,
}

/// Bytes of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activations {
    /// Stored for the backward pass: the down path and the middle block, whose output is the discriminator's input.
    pub(crate) kept_down: u64,
    /// Stored for the backward pass: the up path.
    pub(crate) kept_up: u64,
    /// Skip connections, also stored without gradients.
    pub(crate) skips: u64,
    /// Inputs, outputs and intermediates of the largest layer.
    pub(crate) largest: u64,
    /// Stored for the backward pass of the largest single block, if blocks are recomputed.
    pub(crate) recomputed: u64,
}

impl Activations {
    /// The activations of a U-Net with weights of these names and shapes, of either class.
    ///
    /// libtorch stores what the backward pass of each operation reads. In values per pixel, with c input and d output
    /// channels:
    ///
    /// | layer | with gradients | while it runs |
    /// | --- | --- | --- |
    /// | residual block | `3 c + 3 d`: input, norm and activation before both convolutions | `max(3 c + d, c + 3 d)` |
    /// | transformer's input and output projections | `2 c + c` | |
    /// | pixel self-attention | `6 c`: input, norm, query, key, value, output | `6 c` |
    /// | cross-attention to a text | `4 c`, and `2 c` per token | `5 c` |
    /// | feed-forward | `18 c`: input, norm, `8 c` in, `4 c` gated half, `4 c` product | `19 c` |
    /// | downsampling, upsampling | `c` before the convolution | `2 c` |
    /// | last norm and convolution | `3 c` | `3 c` |
    ///
    /// If group norm and activation are one operation, the result between them is not stored: `2 c + 2 d` of a residual
    /// block, `2 c` of the last norm.
    ///
    /// With activation checkpointing, a residual block, a pixel attention block and a transformer block store only
    /// their output, `d` or `c`, and the values of the table exist for one block at a time.
    ///
    /// Attention scores are never stored as a whole (flash attention, [Dao et al.
    /// 2022](https://arxiv.org/abs/2205.14135)). The estimate does not include the scratch memory of convolutions and
    /// the allocator's overhead.
    pub fn of(shapes: &[(String, Vec<i64>)], pass: PassShape) -> Self {
        let levels = 1 + shapes.iter().filter_map(|(name, _)| down_level(name)).max().unwrap_or(0);
        let mut all = Self::default();
        let mut blocks = BTreeMap::new();
        for (name, shape) in shapes {
            let level = level_of(name, levels);
            if let Some(layer) = Layer::of(name, shape) {
                let pixels = pass.pixels(level);
                all.largest = all.largest.max(layer.at_work(pass, pixels));
                let kept = layer.kept(pass, pixels);
                match block_of(name).filter(|_| pass.checkpointing) {
                    Some(block) => *blocks.entry(block).or_insert(0) += kept,
                    None => all.keep(name, kept),
                }
            }
            if pass.checkpointing {
                all.keep(name, block_output(name, shape, pass, level));
            }
            all.skips += skipped(name, shape, pass, level);
        }
        all.recomputed = blocks.into_values().max().unwrap_or(0);
        all
    }

    /// Bytes of a pass with gradients: those stored for the backward pass, and those of the largest layer.
    pub fn training(&self) -> u64 {
        self.kept_down + self.kept_up + self.recomputed + self.largest
    }

    /// Peak bytes of a pass without gradients.
    pub(crate) fn inference(&self) -> u64 {
        self.skips + self.largest
    }

    fn keep(&mut self, name: &str, kept: u64) {
        if name.starts_with("up_blocks") || name.starts_with("conv_out") {
            self.kept_up += kept;
        } else {
            self.kept_down += kept;
        }
    }
}

impl PassShape {
    /// Pixels of a batch at a level; odd sides are rounded up when they are halved.
    fn pixels(&self, level: u32) -> u64 {
        let side = |side: u64| (0..level).fold(side, |side, _| side.div_ceil(2));
        self.batch * side(self.size[0]) * side(self.size[1])
    }
}

/// What the backward pass of a layer reads, in values per pixel.
struct Layer {
    normed: u64,
    /// The part of these between a group norm and its activation.
    between: u64,
    computed: u64,
    /// Values per pixel while the layer runs.
    at_work: u64,
    /// Values per token of the text.
    per_token: u64,
    /// 4 for a layer that runs at twice the height and width.
    scale: u64,
}

impl Layer {
    /// Bytes that the backward pass reads.
    fn kept(&self, pass: PassShape, pixels: u64) -> u64 {
        let normed = self.normed - if pass.fused_norms { self.between } else { 0 };
        let bytes = normed * pass.normed_bytes + self.computed * pass.computed_bytes;
        let tokens = pass.batch * pass.tokens * self.per_token * pass.computed_bytes;
        pixels * self.scale * bytes + tokens
    }

    /// Bytes while it runs.
    fn at_work(&self, pass: PassShape, pixels: u64) -> u64 {
        pixels * self.scale * self.at_work * pass.computed_bytes
    }

    /// The layer of a weight; none for weights that are counted with another.
    fn of(name: &str, shape: &[i64]) -> Option<Self> {
        let [out, inputs] = [*shape.first()? as u64, shape.get(1).copied().unwrap_or(0) as u64];
        let layer = |normed, computed, at_work| {
            Some(Self { normed, between: 0, computed, at_work, per_token: 0, scale: 1 })
        };
        // Norm and activation, and what their backward passes read.
        let activated =
            |width, at_work| Some(Self { between: width, ..layer(2 * width, width, at_work)? });
        let is = |end: &str| name.ends_with(end);
        let in_transformer = name.contains("transformer_blocks");
        if name.contains("resnets.") && is(".conv1.weight") {
            return activated(inputs, (3 * inputs + out).max(inputs + 3 * out));
        }
        if name.contains("resnets.") && is(".conv2.weight") {
            return activated(out, 0);
        }
        if is(".proj_in.weight") {
            return layer(out, out, 0);
        }
        if is(".proj_out.weight") {
            return layer(0, out, 0);
        }
        if is("attn2.to_q.weight") {
            return Some(Self { per_token: 2 * out, ..layer(out, 3 * out, 5 * out)? });
        }
        if is("attn1.to_q.weight") || (!in_transformer && is("to_q.weight")) {
            return layer(out, 5 * out, 6 * out);
        }
        if is("ff.net.0.proj.weight") {
            return layer(inputs, 17 * inputs, 19 * inputs);
        }
        if is("downsamplers.0.conv.weight") {
            return layer(0, out, 2 * out);
        }
        if is("upsamplers.0.conv.weight") {
            return Some(Self { scale: 4, ..layer(0, out, 2 * out)? });
        }
        match name {
            "conv_in.weight" => layer(0, inputs, out),
            "conv_out.weight" => activated(inputs, 3 * inputs),
            _ => None,
        }
    }
}

/// Bytes of the skip connection after a weight's layer.
fn skipped(name: &str, shape: &[i64], pass: PassShape, level: u32) -> u64 {
    let channels = shape.first().copied().unwrap_or(0) as u64;
    let is_down = name.starts_with("down_blocks");
    let pixels = match name {
        "conv_in.weight" => pass.pixels(0),
        _ if is_down && name.ends_with(".conv2.weight") => pass.pixels(level),
        _ if is_down && name.ends_with("downsamplers.0.conv.weight") => pass.pixels(level + 1),
        _ => 0,
    };
    pixels * channels * pass.computed_bytes
}

/// The recomputable block of a weight; none for layers outside blocks.
fn block_of(name: &str) -> Option<&str> {
    let (unit, at) = ["transformer_blocks.", "resnets."]
        .iter()
        .find_map(|unit| Some((*unit, name.find(unit)?)))
        .or_else(|| {
            // Pixel attention; a transformer's own norm and projections are not recomputed.
            let at = name.find("attentions.").filter(|_| name.ends_with("to_q.weight"))?;
            Some(("attentions.", at))
        })?;
    let number = at + unit.len();
    let end = name[number..].find('.').map_or(name.len(), |dot| number + dot);
    Some(&name[..end])
}

/// Bytes of a block's output, counted at the weight of its last layer.
fn block_output(name: &str, shape: &[i64], pass: PassShape, level: u32) -> u64 {
    let is_last = ["conv2.weight", "ff.net.0.proj.weight"].iter().any(|end| name.ends_with(end))
        || (name.ends_with("to_q.weight") && !name.contains("transformer_blocks"));
    let width = if name.ends_with("ff.net.0.proj.weight") { shape.get(1) } else { shape.first() };
    match (block_of(name).filter(|_| is_last), width) {
        (Some(_), Some(&width)) => pass.pixels(level) * width as u64 * pass.computed_bytes,
        _ => 0,
    }
}

fn down_level(name: &str) -> Option<u32> {
    name.strip_prefix("down_blocks.")?.split('.').next()?.parse().ok()
}

/// How often the height and width have been halved at a weight's layer.
fn level_of(name: &str, levels: u32) -> u32 {
    let up = |name: &str| name.strip_prefix("up_blocks.")?.split('.').next()?.parse::<u32>().ok();
    match (down_level(name), up(name)) {
        (Some(level), _) => level,
        (_, Some(i)) => (levels - 1).saturating_sub(i),
        _ if name.starts_with("mid_block") => levels - 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASS: PassShape = PassShape {
        batch: 2,
        size: [8, 6],
        tokens: 7,
        computed_bytes: 4,
        normed_bytes: 4,
        fused_norms: false,
        checkpointing: false,
    };

    fn shapes(weights: &[(&str, &[i64])]) -> Vec<(String, Vec<i64>)> {
        weights.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect()
    }

    /// Counted by hand, layer by layer.
    #[test]
    fn a_small_network_adds_up() {
        let network = shapes(&[
            ("conv_in.weight", &[16, 4, 3, 3]),
            ("down_blocks.0.resnets.0.conv1.weight", &[16, 16, 3, 3]),
            ("down_blocks.0.resnets.0.conv2.weight", &[16, 16, 3, 3]),
            ("down_blocks.0.downsamplers.0.conv.weight", &[16, 16, 3, 3]),
            ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight", &[16, 16]),
            ("mid_block.attentions.0.to_q.weight", &[16, 16]),
            ("up_blocks.1.resnets.0.conv1.weight", &[16, 32, 3, 3]),
            ("conv_out.weight", &[4, 16, 3, 3]),
        ]);
        let fine = 2 * 8 * 6 * 4;
        let coarse = 2 * 4 * 3 * 4;
        let all = Activations::of(&network, PASS);
        let text = 2 * 7 * 2 * 16 * 4;
        assert_eq!(all.kept_down, fine * (4 + 48 + 48 + 16) + coarse * (4 * 16 + 6 * 16) + text);
        assert_eq!(all.kept_up, fine * (3 * 32 + 3 * 16));
        assert_eq!(all.skips, fine * (16 + 16) + coarse * 16);
        assert_eq!(all.largest, fine * (3 * 32 + 16));
        let fused = Activations::of(&network, PassShape { fused_norms: true, ..PASS });
        assert_eq!(all.kept_down - fused.kept_down, fine * (16 + 16));
        assert_eq!(all.kept_up - fused.kept_up, fine * (32 + 16));
    }

    /// Blocks store their outputs; the largest, here the transformer's, is recomputed.
    #[test]
    fn with_checkpointing_blocks_keep_only_their_outputs() {
        let block = "down_blocks.1.attentions.0.transformer_blocks.0";
        let names = ["attn1.to_q", "attn2.to_q", "ff.net.0.proj"];
        let named = names.map(|name| format!("{block}.{name}.weight"));
        let network = shapes(&[
            ("conv_in.weight", &[16, 4, 3, 3]),
            ("down_blocks.0.resnets.0.conv1.weight", &[16, 16, 3, 3]),
            ("down_blocks.0.resnets.0.conv2.weight", &[16, 16, 3, 3]),
            ("down_blocks.0.downsamplers.0.conv.weight", &[16, 16, 3, 3]),
            ("down_blocks.1.attentions.0.proj_in.weight", &[16, 16]),
            (&named[0], &[16, 16]),
            (&named[1], &[16, 16]),
            (&named[2], &[128, 16]),
            ("down_blocks.1.attentions.0.proj_out.weight", &[16, 16]),
            ("mid_block.attentions.0.to_q.weight", &[16, 16]),
            ("up_blocks.1.resnets.0.conv1.weight", &[16, 32, 3, 3]),
            ("up_blocks.1.resnets.0.conv2.weight", &[16, 16, 3, 3]),
        ]);
        let (fine, coarse) = (2 * 8 * 6 * 4, 2 * 4 * 3 * 4);
        let text = 2 * 7 * 2 * 16 * 4;
        let all = Activations::of(&network, PassShape { checkpointing: true, ..PASS });
        // Input, block and down path; the transformer's input projection, block and output projection, and the pixel
        // attention.
        assert_eq!(all.kept_down, fine * (4 + 16 + 16) + coarse * (32 + 16 + 16 + 16));
        assert_eq!(all.kept_up, fine * 16);
        let transformer = coarse * (6 + 4 + 18) * 16 + text;
        assert_eq!(all.recomputed, transformer.max(fine * (3 * 32 + 3 * 16)));
        let plain = Activations::of(&network, PASS);
        assert_eq!((plain.recomputed, plain.skips), (0, all.skips));
    }

    #[test]
    fn twice_the_batch_is_twice_the_memory() {
        let network = shapes(&[("up_blocks.0.resnets.1.conv1.weight", &[8, 12, 3, 3])]);
        let [one, two] = [2, 4].map(|batch| Activations::of(&network, PassShape { batch, ..PASS }));
        assert_eq!((2 * one.kept_up, 2 * one.largest), (two.kept_up, two.largest));
    }
}
