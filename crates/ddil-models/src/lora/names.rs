//! The names of a network's layers in adapter files of many programs.

use std::collections::BTreeMap;

use super::Layer;
use super::ldm::LdmNames;

/// The prefix of names of the network in diffusers' files.
pub(super) const UNET: &str = "unet.";
/// The prefix in kohya's files, where dots are written as underscores.
pub(super) const KOHYA_UNET: &str = "lora_unet_";

/// Wrappers around a network: of PEFT, diffusers, `ComfyUI`, and PyTorch.
const WRAPPERS: [&str; 6] = [
    "base_model.model.",
    UNET,
    "model.diffusion_model.",
    "diffusion_model.",
    "module.",
    "_orig_mod.",
];
/// Prefixes of names with underscores.
const UNDERSCORED: [&str; 3] = [KOHYA_UNET, "lycoris_unet_", "lycoris_"];
/// Prefixes of names of text encoders, and of embeddings of words.
const TEXT_ENCODERS: [&str; 11] = [
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "text_model.",
    "lora_te",
    "lycoris_te",
    "cond_stage_model.",
    "conditioner.",
    "clip_l.",
    "clip_g.",
    "bundle_emb.",
];

/// The role of a tensor in its adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Down,
    Up,
    Alpha,
}

/// The layers by their names in files: those of diffusers, and those of the original Stable Diffusion, which `ComfyUI`
/// and kohya's programs use.
pub(super) struct Names {
    plain: BTreeMap<String, usize>,
    underscored: BTreeMap<String, usize>,
}

impl Names {
    pub(super) fn of(layers: &[Layer]) -> Self {
        let ldm = LdmNames::of(&layers.iter().map(|layer| layer.name.as_str()));
        let mut plain = BTreeMap::new();
        for (i, layer) in layers.iter().enumerate() {
            plain.extend(ldm.names(&layer.name).into_iter().map(|name| (name, i)));
            plain.insert(layer.name.clone(), i);
        }
        let underscored = plain.iter().map(|(name, i)| (underscored(name), *i)).collect();
        Self { plain, underscored }
    }

    /// The layer of a tensor, and its role.
    pub(super) fn parse(&self, name: &str) -> Option<(usize, Part)> {
        let (name, part) = split_end(without_wrappers(name))?;
        let layer = match UNDERSCORED.iter().find_map(|prefix| name.strip_prefix(prefix)) {
            Some(name) => found(&self.underscored, name, "_"),
            // The processors of attention had the adapters in 2023.
            None => found(&self.plain, &name.replace(".processor.", "."), "."),
        };
        layer.map(|layer| (layer, part))
    }
}

/// A name, or that of the only layer in a list of it: `to_out` is `to_out.0` in diffusers' files of 2023.
fn found(names: &BTreeMap<String, usize>, name: &str, separator: &str) -> Option<usize> {
    let in_list = || {
        let list = format!("{name}{separator}0");
        name.ends_with("to_out").then(|| names.get(&list)).flatten()
    };
    names.get(name).or_else(in_list).copied()
}

/// Whether a tensor belongs to a text encoder.
pub(super) fn is_of_text(name: &str) -> bool {
    let name = without_wrappers(name);
    TEXT_ENCODERS.iter().any(|prefix| name.starts_with(prefix))
}

pub(super) fn underscored(name: &str) -> String {
    name.replace('.', "_")
}

fn without_wrappers(mut name: &str) -> &str {
    while let Some(inner) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
        name = inner;
    }
    name
}

/// The name of a layer, and what follows it as a role.
fn split_end(name: &str) -> Option<(&str, Part)> {
    let ends = [
        (".lora.down.weight", Part::Down),
        (".lora.up.weight", Part::Up),
        (".lora_down.weight", Part::Down),
        (".lora_up.weight", Part::Up),
        // diffusers in 2023: `to_q_lora.down.weight`.
        ("_lora.down.weight", Part::Down),
        ("_lora.up.weight", Part::Up),
        (".lora_linear_layer.down.weight", Part::Down),
        (".lora_linear_layer.up.weight", Part::Up),
        ("_lora.alpha", Part::Alpha),
        (".lora.alpha", Part::Alpha),
        (".alpha", Part::Alpha),
    ];
    let ended = ends.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, *part)));
    ended.or_else(|| {
        // PEFT's, with or without the name of the adapter.
        let (end, part) = [(".lora_A.", Part::Down), (".lora_B.", Part::Up)]
            .into_iter()
            .find(|(end, _)| name.contains(end))?;
        let (layer, rest) = name.split_once(end)?;
        let adapter = rest.strip_suffix("weight")?.strip_suffix('.');
        let is_plain = rest == "weight" || adapter.is_some_and(|adapter| !adapter.is_empty());
        is_plain.then_some((layer, part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_every_program_are_known() {
        for (name, layer, part) in [
            ("a.to_q.lora_A.weight", "a.to_q", Part::Down),
            ("a.to_q.lora_B.default_0.weight", "a.to_q", Part::Up),
            ("a.lora_down.weight", "a", Part::Down),
            ("a.processor.to_q_lora.up.weight", "a.processor.to_q", Part::Up),
            ("a.lora.alpha", "a", Part::Alpha),
            ("a.alpha", "a", Part::Alpha),
        ] {
            assert_eq!(split_end(name), Some((layer, part)), "{name}");
        }
        for name in
            ["a.lora_A.bias", "a.lora_A..weight", "a.lora_magnitude_vector", "lora_A.weight"]
        {
            assert_eq!(split_end(name), None, "{name}");
        }
    }

    #[test]
    fn text_encoders_are_recognised_within_wrappers() {
        for name in
            ["text_encoder.a", "base_model.model.text_encoder_2.a", "lora_te1_a", "text_model.a"]
        {
            assert!(is_of_text(name), "{name}");
        }
        assert!(!is_of_text("unet.text_time.a") && !is_of_text("lora_unet_te"));
    }
}
