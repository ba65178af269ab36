//! Config files to start from.

use std::path::Path;

use ddil_files::settings::Settings;

/// A commented config file.
pub(crate) struct Preset {
    /// Its name.
    pub(crate) name: &'static str,
    /// The verb that reads it.
    pub(crate) verb: &'static str,
    /// Its purpose.
    pub(crate) about: &'static str,
    /// The text of the file.
    pub(crate) text: &'static str,
}

/// All presets.
pub(crate) const PRESETS: [Preset; 27] = [
    Preset {
        name: "own-images-teacher",
        verb: "train",
        about: "a class-conditional pixel teacher on a folder of your own images",
        text: include_str!("../presets/own-images-teacher.toml"),
    },
    Preset {
        name: "own-images-pd-ddil",
        verb: "distill",
        about: "your own pixel teacher to 4 steps, by PD with DDIL",
        text: include_str!("../presets/own-images-pd-ddil.toml"),
    },
    Preset {
        name: "own-images-lcm-ddil",
        verb: "distill",
        about: "your own pixel teacher to 4 steps, by LCM with DDIL",
        text: include_str!("../presets/own-images-lcm-ddil.toml"),
    },
    Preset {
        name: "own-images-dmd2-ddil",
        verb: "distill",
        about: "your own pixel teacher to 4 steps, by DMD2 with DDIL",
        text: include_str!("../presets/own-images-dmd2-ddil.toml"),
    },
    Preset {
        name: "own-text-to-image-pd-ddil",
        verb: "distill",
        about: "your own text-to-image model to 4 steps, by PD with DDIL, as an adapter",
        text: include_str!("../presets/own-text-to-image-pd-ddil.toml"),
    },
    Preset {
        name: "own-text-to-image-lcm-ddil",
        verb: "distill",
        about: "your own text-to-image model to 4 steps, by LCM with DDIL, as an adapter",
        text: include_str!("../presets/own-text-to-image-lcm-ddil.toml"),
    },
    Preset {
        name: "own-text-to-image-dmd2-ddil",
        verb: "distill",
        about: "your own text-to-image model to 4 steps, by DMD2 with DDIL, as an adapter",
        text: include_str!("../presets/own-text-to-image-dmd2-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-teacher",
        verb: "train",
        about: "a class-conditional pixel teacher on Fashion-MNIST",
        text: include_str!("../presets/fashion-mnist-teacher.toml"),
    },
    Preset {
        name: "fashion-mnist-16-teacher",
        verb: "train",
        about: "a small teacher on Fashion-MNIST at 16x16, for experiments of minutes",
        text: include_str!("../presets/fashion-mnist-16-teacher.toml"),
    },
    Preset {
        name: "fashion-mnist-pd-ddil",
        verb: "distill",
        about: "that teacher to 4 steps, by progressive distillation (PD) with DDIL",
        text: include_str!("../presets/fashion-mnist-pd-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-lcm-ddil",
        verb: "distill",
        about: "that teacher to 4 steps, by consistency distillation (LCM) with DDIL",
        text: include_str!("../presets/fashion-mnist-lcm-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-dmd2-ddil",
        verb: "distill",
        about: "that teacher to 4 steps, by distribution matching (DMD2) with DDIL",
        text: include_str!("../presets/fashion-mnist-dmd2-ddil.toml"),
    },
    Preset {
        name: "fashion-mnist-self-ddil",
        verb: "distill",
        about: "a few-step student whose own average is the teacher",
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
        about: "PD, LCM and DMD2: as published, with DDIL, and with DDIL and thresholding",
        text: include_str!("../presets/compare-fashion-mnist.toml"),
    },
    Preset {
        name: "compare-stability",
        verb: "compare",
        about: "how often runs diverge or collapse at small batches and high learning rates",
        text: include_str!("../presets/compare-stability.toml"),
    },
    Preset {
        name: "compare-precision",
        verb: "compare",
        about: "students trained in bfloat16 against float32",
        text: include_str!("../presets/compare-precision.toml"),
    },
    Preset {
        name: "compare-fashion-mnist-pd",
        verb: "compare",
        about: "PD with and without DDIL and thresholding, three seeds each",
        text: include_str!("../presets/compare-fashion-mnist-pd.toml"),
    },
    Preset {
        name: "compare-demo",
        verb: "compare",
        about: "what `ddil demo` runs: data that lack classes of the teacher, and all data as the control",
        text: include_str!("../presets/compare-demo.toml"),
    },
    Preset {
        name: "compare-fashion-mnist-16",
        verb: "compare",
        about: "every source of states alone and together at 16x16, with data that lack classes",
        text: include_str!("../presets/compare-fashion-mnist-16.toml"),
    },
    Preset {
        name: "compare-dmd2",
        verb: "compare",
        about: "DMD2 as published, and with a critic and noise levels that follow the student's steps, at 16x16",
        text: include_str!("../presets/compare-dmd2.toml"),
    },
    Preset {
        name: "fashion-mnist-text-lcm-ddil",
        verb: "distill",
        about: "a text-to-image model of Fashion-MNIST to 4 steps, by LCM with DDIL",
        text: include_str!("../presets/fashion-mnist-text-lcm-ddil.toml"),
    },
    Preset {
        name: "sd15-pd-ddil",
        verb: "distill",
        about: "Stable Diffusion 1.5 to 4 steps, by PD with DDIL",
        text: include_str!("../presets/sd15-pd-ddil.toml"),
    },
    Preset {
        name: "sd15-lcm-ddil",
        verb: "distill",
        about: "Stable Diffusion 1.5 to 4 steps, by LCM with DDIL",
        text: include_str!("../presets/sd15-lcm-ddil.toml"),
    },
    Preset {
        name: "sd15-lcm-lora-ddil",
        verb: "distill",
        about: "Stable Diffusion 1.5 to 4 steps, by LCM with DDIL, as an adapter (LCM-LoRA)",
        text: include_str!("../presets/sd15-lcm-lora-ddil.toml"),
    },
    Preset {
        name: "ssd1b-dmd2-ddil",
        verb: "distill",
        about: "SSD-1B to 4 steps, by DMD2 with DDIL",
        text: include_str!("../presets/ssd1b-dmd2-ddil.toml"),
    },
    Preset {
        name: "sdxl-lcm-lora-ddil",
        verb: "distill",
        about: "SDXL to 4 steps, by LCM with DDIL, as an adapter (LCM-LoRA)",
        text: include_str!("../presets/sdxl-lcm-lora-ddil.toml"),
    },
];

/// The settings of plain distillation: states of the dataset alone, as in the methods' papers.
pub(crate) const PLAIN: [&str; 2] = [
    "mixing.priors={ kind = \"constant\", priors = { forward = 1.0 } }",
    "mixing.pure_noise_at_tmax=false",
];

impl Preset {
    /// Its text with the tables of `mixing` replaced by those of plain distillation; none for a preset of another verb.
    pub(crate) fn plain(&self) -> Option<String> {
        if self.verb != "distill" {
            return None;
        }
        let (mut text, mut is_mixing) = (String::new(), false);
        for line in self.text.lines() {
            if line.starts_with('[') {
                let was_mixing = is_mixing;
                is_mixing = line.starts_with("[mixing");
                if is_mixing && !was_mixing {
                    text += PLAIN_TABLE;
                }
            }
            if !is_mixing {
                text = text + line + "\n";
            }
        }
        Some(text)
    }
}

const PLAIN_TABLE: &str = "\
[mixing]                        # the plain method: noised data of the dataset alone
pure_noise_at_tmax = false
priors = { kind = \"constant\", priors = { forward = 1.0 } }

";

/// Teachers that presets name and that are in the repository but not in the installed program, with how to get each.
/// The first alone would make the program twenty times as large, and a package may have at most 10 MB.
pub(crate) const TEACHERS: [(&str, &str); 3] = [
    (
        "assets/fashion-mnist-teacher",
        "it is in ddil's repository, not in the installed program. Run from a clone of the repository, or train one \
         (hours on a CPU) with `ddil init fashion-mnist-teacher && ddil train fashion-mnist-teacher.toml` and set \
         teacher.path (for `ddil demo`: --teacher) to its run folder",
    ),
    (
        "assets/fashion-mnist-16-teacher",
        "it is in ddil's repository, not in the installed program. Run from a clone of the repository, or train one \
         (half an hour on a core) with `ddil init fashion-mnist-16-teacher && ddil train fashion-mnist-16-teacher.toml` and \
         set teacher.path to its run folder",
    ),
    (
        "assets/fashion-mnist-text-to-image",
        "it is in ddil's repository, not in the installed program. Run from a clone of the repository, or set \
         teacher.path to your own text-to-image model",
    ),
];

/// How to get a missing teacher, if it is one of [`TEACHERS`].
pub(crate) fn missing_teacher(path: &Path) -> Option<String> {
    let known = TEACHERS.iter().find(|(teacher, _)| path == Path::new(teacher) && !path.exists());
    known.map(|(teacher, how)| format!("{teacher} does not exist: {how}"))
}

/// The verb that a config is for, and the key of the config that only this verb has.
pub(crate) fn verb_of(settings: &Settings) -> Option<(&'static str, &'static str)> {
    let keys = [
        ("compare", "axes"),
        ("compare", "base"),
        ("distill", "teacher"),
        ("distill", "mixing"),
        ("distill", "objective"),
        ("distill", "student"),
        ("train", "train"),
        ("train", "model"),
    ];
    keys.into_iter().find(|(_, key)| settings.has(key))
}

/// The preset with a given name.
pub(crate) fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// The most similar name.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    let similarity = |preset: &&Preset| strsim::jaro_winkler(name, preset.name);
    let best = PRESETS.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(&best) > 0.7).then_some(best.name)
}

#[cfg(test)]
mod tests {
    use ddil_core::{PriorSchedule, Priors};
    use ddil_trainer::config::DistillConfig;

    use super::*;

    fn config(text: &str, plain: bool) -> DistillConfig {
        let mut settings = Settings::parse("preset.toml", text).expect("it is TOML");
        for change in PLAIN.iter().filter(|_| plain) {
            settings.set(change).expect("there is such a key");
        }
        settings.build().expect("the settings are valid")
    }

    #[test]
    fn a_plain_preset_is_the_preset_with_two_settings() {
        for preset in PRESETS.iter().filter(|preset| preset.verb == "distill") {
            let text = preset.plain().expect("it distils");
            let (written, set) = (config(&text, false), config(preset.text, true));
            assert_eq!(written.mixing.priors, PriorSchedule::constant(Priors::FORWARD_ONLY));
            assert!(!written.mixing.pure_noise_at_tmax, "{}", preset.name);
            assert_eq!(
                (set.mixing.priors, set.mixing.pure_noise_at_tmax),
                (written.mixing.priors, false)
            );
            assert_eq!((set.objective, set.student), (written.objective, written.student));
            assert_eq!(set.thresholding, written.thresholding, "{}", preset.name);
        }
        assert!(
            PRESETS.iter().filter(|preset| preset.verb != "distill").all(|p| p.plain().is_none())
        );
    }
}
