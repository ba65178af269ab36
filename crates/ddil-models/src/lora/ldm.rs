//! Names of a U-Net's layers in the original code of Stable Diffusion.

use std::collections::BTreeMap;

/// The names of the U-Net of [latent diffusion](https://github.com/CompVis/latent-diffusion), which counts the blocks of all levels
/// in one list: `input_blocks.4.1` is `down_blocks.1.attentions.0` of a network with two residual blocks per level.
pub(super) struct LdmNames {
    down: Path,
    up: Path,
}

/// The levels of a path.
#[derive(Default)]
struct Path {
    /// Number of residual blocks of each level.
    blocks: Vec<usize>,
    /// Whether each level has attention.
    attends: Vec<bool>,
}

/// Layers of a residual block.
const RESNET: [(&str, &str); 4] = [
    ("conv1", "in_layers.2"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
];

/// Layers outside of the blocks.
const OUTER: [(&str, &str); 8] = [
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding.linear_1", "label_emb.0.0"),
    ("class_embedding.linear_2", "label_emb.0.2"),
];

impl LdmNames {
    /// Of the network with layers of these names.
    pub(super) fn of<'a>(layers: &(impl Iterator<Item = &'a str> + Clone)) -> Self {
        let path = |name| Path::of(name, layers.clone());
        Self { down: path("down_blocks"), up: path("up_blocks") }
    }

    /// The original names of a layer: none for one that the original network does not have, two for a convolution after
    /// a level without attention, which diffusers reads under the name of one after a level with it.
    pub(super) fn names(&self, layer: &str) -> Vec<String> {
        let name = self.name(layer);
        let as_if_after_attention = name.as_deref().and_then(|name| {
            let (block, rest) = name.strip_prefix("output_blocks.")?.split_once(".1.conv")?;
            rest.is_empty().then(|| format!("output_blocks.{block}.2.conv"))
        });
        name.into_iter().chain(as_if_after_attention).collect()
    }

    fn name(&self, layer: &str) -> Option<String> {
        if let Some((_, name)) = OUTER.iter().find(|(new, _)| *new == layer) {
            return Some((*name).to_owned());
        }
        let Some(within) = layer.strip_prefix("mid_block.") else {
            return self.in_level(layer);
        };
        let (kind, index, rest) = place(within)?;
        match kind {
            "resnets" => Some(format!("middle_block.{}.{}", 2 * index, resnet(rest)?)),
            "attentions" => Some(format!("middle_block.{}.{rest}", 2 * index + 1)),
            _ => None,
        }
    }

    fn in_level(&self, layer: &str) -> Option<String> {
        let (path, level, within) = place(layer)?;
        let (kind, index, rest) = place(within)?;
        let (list, path, first) = match path {
            // The first of the list is the first convolution.
            "down_blocks" => ("input_blocks", &self.down, 1),
            "up_blocks" => ("output_blocks", &self.up, 0),
            _ => return None,
        };
        let blocks = *path.blocks.get(level)?;
        // Each level of the down path ends with an entry of its own that halves the map.
        let start: usize = first + path.blocks[..level].iter().map(|n| n + first).sum::<usize>();
        match kind {
            "resnets" => Some(format!("{list}.{}.0.{}", start + index, resnet(rest)?)),
            "attentions" => Some(format!("{list}.{}.1.{rest}", start + index)),
            "downsamplers" if rest == "conv" => Some(format!("{list}.{}.0.op", start + blocks)),
            "upsamplers" => {
                let place = 1 + usize::from(*path.attends.get(level)?);
                Some(format!("{list}.{}.{place}.{rest}", start + blocks.checked_sub(1)?))
            }
            _ => None,
        }
    }
}

impl Path {
    fn of<'a>(path: &str, layers: impl Iterator<Item = &'a str>) -> Self {
        let mut counts: BTreeMap<usize, (usize, bool)> = BTreeMap::new();
        for layer in layers {
            let Some((found, level, within)) = place(layer) else { continue };
            let Some((kind, index, _)) = place(within).filter(|_| found == path) else { continue };
            let (blocks, attends) = counts.entry(level).or_default();
            match kind {
                "resnets" => *blocks = (*blocks).max(index + 1),
                "attentions" => *attends = true,
                _ => {}
            }
        }
        let (blocks, attends) = counts.into_values().unzip();
        Self { blocks, attends }
    }
}

/// `name.index.rest`.
fn place(name: &str) -> Option<(&str, usize, &str)> {
    let (list, rest) = name.split_once('.')?;
    let (index, rest) = rest.split_once('.')?;
    Some((list, index.parse().ok()?, rest))
}

fn resnet(layer: &str) -> Option<&'static str> {
    RESNET.iter().find_map(|(new, old)| (*new == layer).then_some(*old))
}
