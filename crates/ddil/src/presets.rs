//! Config files to start from.

/// A commented config file.
pub(crate) struct Preset {
    /// What it is called.
    pub(crate) name: &'static str,
    /// Which verb reads it.
    pub(crate) verb: &'static str,
    /// What it is for.
    pub(crate) about: &'static str,
    /// The file.
    pub(crate) text: &'static str,
}

/// All of them.
pub(crate) const PRESETS: [Preset; 16] = [
    Preset {
        name: "fashion-mnist-teacher",
        verb: "train",
        about: "a class-conditional pixel teacher on Fashion-MNIST",
        text: include_str!("../presets/fashion-mnist-teacher.toml"),
    },
    Preset {
        name: "fashion-mnist-pd-ddil",
        verb: "distill",
        about: "the same teacher to 4 steps, by progressive distillation with DDIL",
        text: include_str!("../presets/fashion-mnist-pd-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-lcm-ddil",
        verb: "distill",
        about: "the same teacher to a latent consistency model with DDIL",
        text: include_str!("../presets/fashion-mnist-lcm-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-dmd2-ddil",
        verb: "distill",
        about: "the same teacher to 4 steps, by distribution matching (DMD2) with DDIL",
        text: include_str!("../presets/fashion-mnist-dmd2-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-self-ddil",
        verb: "distill",
        about: "a few-step student that is its own teacher",
        text: include_str!("../presets/fashion-mnist-self-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-small-ddil",
        verb: "distill",
        about: "a student that is smaller than its teacher",
        text: include_str!("../presets/fashion-mnist-small-ddil.toml"),
    },
    Preset {
        name: "compare-fashion-mnist",
        verb: "compare",
        about: "three methods as published, with DDIL and with thresholds too",
        text: include_str!("../presets/compare-fashion-mnist.toml"),
    },
    Preset {
        name: "compare-stability",
        verb: "compare",
        about: "how often small batches and high learning rates break a run",
        text: include_str!("../presets/compare-stability.toml"),
    },
    Preset {
        name: "compare-precision",
        verb: "compare",
        about: "whether students trained in bfloat16 are as good as those in float32",
        text: include_str!("../presets/compare-precision.toml"),
    },
    Preset {
        name: "compare-fashion-mnist-pd",
        verb: "compare",
        about: "that distillation with and without DDIL and thresholds, three seeds each",
        text: include_str!("../presets/compare-fashion-mnist-pd.toml"),
    },
    Preset {
        name: "fashion-mnist-text-lcm-ddil",
        verb: "distill",
        about: "a text-to-image model of Fashion-MNIST to 4 steps, as a consistency model with DDIL",
        text: include_str!("../presets/fashion-mnist-text-lcm-ddil.toml"),
    },
    Preset {
        name: "sd15-pd-ddil",
        verb: "distill",
        about: "Stable Diffusion 1.5 to 4 steps, by progressive distillation with DDIL",
        text: include_str!("../presets/sd15-pd-ddil.toml"),
    },
    Preset {
        name: "sd15-lcm-ddil",
        verb: "distill",
        about: "the same to a latent consistency model with DDIL",
        text: include_str!("../presets/sd15-lcm-ddil.toml"),
    },
    Preset {
        name: "sd15-lcm-lora-ddil",
        verb: "distill",
        about: "the same as an adapter, an LCM-LoRA",
        text: include_str!("../presets/sd15-lcm-lora-ddil.toml"),
    },
    Preset {
        name: "ssd1b-dmd2-ddil",
        verb: "distill",
        about: "SSD-1B to 4 steps, by distribution matching (DMD2) with DDIL",
        text: include_str!("../presets/ssd1b-dmd2-ddil.toml"),
    },
    Preset {
        name: "sdxl-lcm-lora-ddil",
        verb: "distill",
        about: "SDXL to a latent consistency model, as an adapter with DDIL",
        text: include_str!("../presets/sdxl-lcm-lora-ddil.toml"),
    },
];

/// The preset of that name.
pub(crate) fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// The name that looks most like one.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    let likeness = |preset: &&Preset| strsim::jaro_winkler(name, preset.name);
    let best = PRESETS.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(&best) > 0.7).then_some(best.name)
}
