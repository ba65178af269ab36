//! `run.activation_checkpointing`: less memory and the same student.

use ddil_models::weights;
use tch::{Kind, Tensor};

use crate::support::{TestResult, Workshop, checkpoints};

/// Of all weights that a run learned, as one vector.
fn learned(run: &std::path::Path) -> Result<Tensor, Box<dyn std::error::Error>> {
    let last = checkpoints(run).into_values().next_back().ok_or("it was saved")?;
    let mut named: Vec<_> =
        weights::read_all(last.join("parameters.safetensors"))?.into_iter().collect();
    named.sort_by(|(left, _), (right, _)| left.cmp(right));
    let flat: Vec<Tensor> = named.iter().map(|(_, tensor)| tensor.flatten(0, -1)).collect();
    Ok(Tensor::cat(&flat, 0).to_kind(Kind::Double))
}

#[test]
fn every_method_learns_the_same() -> TestResult {
    let workshop = Workshop::with_teacher();
    let methods = [
        ("pd", &["objective={ method = \"progressive\" }"][..]),
        ("dmd2", &["objective={ method = \"dmd2\" }"]),
        ("lora", &["student.lora={ rank = 2, alpha = 4.0 }"]),
    ];
    for (name, settings) in methods {
        let plain = learned(&workshop.complete("distill", name, settings))?;
        let on = [settings, &["run.activation_checkpointing=true"]].concat();
        let run = workshop.complete("distill", &format!("{name}-checkpointing"), &on);
        let text = std::fs::read_to_string(run.join("config.toml"))?;
        assert!(text.contains("activation_checkpointing = true"), "{text}");
        let error = (learned(&run)? - &plain).norm() / plain.norm();
        assert!(error.double_value(&[]) < 1e-3, "{name}: {error}");
    }
    Ok(())
}
