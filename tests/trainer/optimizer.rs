use ddil_trainer::{AdamW, AdamWConfig, Error, checkpoint::CheckpointWriter, ensure_finite};
use tch::{Kind, Tensor};

use crate::TestResult;

fn param(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).expect("a vector")
}

/// One step towards the minimum of a bowl that is steeper at one side.
fn train(optimizer: &mut AdamW, params: &[Tensor]) -> TestResult {
    optimizer.zero_grad()?;
    let loss = params.iter().map(|param| (param.square() * 3.0 + param).sum(Kind::Double));
    loss.sum::<Tensor>().backward();
    let _norm = optimizer.clip()?;
    Ok(optimizer.step(0.05)?)
}

#[test]
fn ten_steps_are_those_of_the_formula() -> TestResult {
    let config = AdamWConfig::default().with(|config| {
        config.weight_decay = 0.1;
        config.max_grad_norm = 2.0;
    });
    let start = [1.0, -2.0, 0.5];
    let weight = param(&start);
    let mut optimizer = config.build(vec![("weight".into(), weight.shallow_clone())])?;

    let (mut p, mut m, mut v) = (start, [0.0; 3], [0.0; 3]);
    for t in 1..=10 {
        train(&mut optimizer, std::slice::from_ref(&weight))?;

        let grads = p.map(|p: f64| 6.0 * p + 1.0);
        let norm = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
        let scale = (2.0 / (norm + 1e-6)).min(1.0);
        for i in 0..3 {
            let g = grads[i] * scale;
            p[i] -= 0.05 * 0.1 * p[i];
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let (m_hat, v_hat) = (m[i] / (1.0 - 0.9_f64.powi(t)), v[i] / (1.0 - 0.999_f64.powi(t)));
            p[i] -= 0.05 * m_hat / (v_hat.sqrt() + 1e-8);
        }
    }
    for (found, expected) in values(&weight).iter().zip(p) {
        assert!((found - expected).abs() < 1e-9, "{found} {expected}");
    }
    Ok(())
}

#[test]
fn clipping_returns_the_norm_from_before_and_leaves_short_gradients_alone() -> TestResult {
    for (max_grad_norm, scale) in [(1.0, 0.2), (5.1, 1.0), (f64::INFINITY, 1.0)] {
        let weight = param(&[3.0, 4.0]);
        let config = AdamWConfig::default().with(|config| config.max_grad_norm = max_grad_norm);
        let optimizer = config.build(vec![("weight".into(), weight.shallow_clone())])?;
        (weight.square().sum(Kind::Double) / 2.0).backward();
        assert!((optimizer.clip()?.double_value(&[]) - 5.0).abs() < 1e-12);
        let grad = values(&weight.grad());
        assert!((grad[0] - 3.0 * scale).abs() < 1e-6 && (grad[1] - 4.0 * scale).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn a_loaded_average_continues_to_the_bit() -> TestResult {
    let build = |values: [&Tensor; 2]| {
        let named =
            vec![("b".into(), values[1].shallow_clone()), ("a".into(), values[0].shallow_clone())];
        AdamWConfig::default().with(|config| config.weight_decay = 0.01).build(named)
    };
    let params = [param(&[1.0, 2.0]), param(&[-0.3])];
    let mut optimizer = build([&params[0], &params[1]])?;
    for _ in 0..5 {
        train(&mut optimizer, &params)?;
    }
    let folder = tempfile::tempdir()?;
    let mut writer = CheckpointWriter::new(folder.path(), 5, "test")?;
    writer.tensors("optimizer.safetensors", &optimizer.state_tensors()?)?;
    let resumed = [0, 1].map(|index: usize| params[index].detach().copy().set_requires_grad(true));
    for _ in 0..5 {
        train(&mut optimizer, &params)?;
    }

    let checkpoint = writer.commit()?;
    let mut other = build([&resumed[0], &resumed[1]])?;
    other.load_state(&checkpoint.tensors("optimizer.safetensors")?)?;
    assert_eq!(other.num_steps(), 5);
    for _ in 0..5 {
        train(&mut other, &resumed)?;
    }
    assert_eq!(other.num_steps(), 10);
    assert_eq!(params, resumed);
    for ((name, left), (_, right)) in optimizer.state_tensors()?.iter().zip(other.state_tensors()?)
    {
        assert_eq!(left, &right, "{name}");
    }
    Ok(())
}

#[test]
fn state_that_does_not_fit_is_refused_whole() -> TestResult {
    let (weight, bias) = (param(&[1.0, 2.0]), param(&[0.0]));
    let named =
        vec![("weight".into(), weight.shallow_clone()), ("bias".into(), bias.shallow_clone())];
    let mut optimizer = AdamWConfig::default().build(named)?;
    train(&mut optimizer, &[weight, bias])?;
    let before: Vec<Tensor> =
        optimizer.state_tensors()?.iter().map(|(_, state)| state.copy()).collect();

    let mut wrong = optimizer.state_tensors()?;
    wrong.retain(|(name, _)| name != "exp_avg.bias");
    wrong[0].1 = Tensor::zeros([3], tch::kind::DOUBLE_CPU);
    wrong[1].1 = Tensor::zeros([1], tch::kind::FLOAT_CPU);
    wrong.push(("exp_avg.gain".into(), Tensor::zeros([1], tch::kind::DOUBLE_CPU)));
    let error = optimizer.load_state(&wrong).expect_err("it does not fit");
    assert_eq!(
        error.to_string(),
        "optimizer: the saved state does not fit:\n  \
         exp_avg.gain: not expected\n  \
         exp_avg.bias: missing\n  \
         exp_avg.weight: is Double [3], not Double [2]\n  \
         exp_avg_sq.bias: is Float [1], not Double [1]"
    );
    for ((_, after), before) in optimizer.state_tensors()?.iter().zip(before) {
        assert_eq!(after, &before);
    }
    Ok(())
}

#[test]
fn a_parameter_without_a_gradient_is_named() -> TestResult {
    let (used, unused) = (param(&[1.0]), param(&[1.0]));
    let named =
        vec![("used".into(), used.shallow_clone()), ("unused".into(), unused.shallow_clone())];
    let mut optimizer = AdamWConfig::default().build(named)?;
    optimizer.zero_grad()?;
    used.sum(Kind::Double).backward();
    for error in [optimizer.clip().expect_err("none"), optimizer.step(0.1).expect_err("none")] {
        assert_eq!(error.to_string(), "1 of 2 parameters have no gradient (the first: `unused`)");
    }
    assert_eq!((values(&used), optimizer.num_steps()), (vec![1.0], 0));
    Ok(())
}

#[test]
fn non_finite_values_stop_the_run_and_are_located() -> TestResult {
    let (fine, wrong) = (param(&[1.0]), param(&[0.0]));
    let named =
        vec![("fine".into(), fine.shallow_clone()), ("wrong".into(), wrong.shallow_clone())];
    let optimizer = AdamWConfig::default().build(named)?;
    (&fine + wrong.sqrt() * 0.0).sum(Kind::Double).backward();
    let norm = optimizer.clip()?.double_value(&[]);
    let error = ensure_finite(7, "grad_norm", norm, || optimizer.non_finite_gradient());
    let error = error.expect_err("0 times infinity").to_string();
    assert_eq!(
        error,
        "step 7: grad_norm is NaN (in the gradients of 1 of 2 parameters, the first: `wrong`)"
    );
    let error = ensure_finite(8, "loss", f64::NEG_INFINITY, || None).expect_err("not finite");
    assert_eq!(error.to_string(), "step 8: loss is -inf");
    ensure_finite(9, "loss", 1.0, || unreachable!("asked only when needed"))?;
    Ok(())
}

#[test]
fn impossible_settings_are_refused() {
    let default = AdamWConfig::default();
    for (config, field) in [
        (default.with(|config| config.beta1 = 1.0), "beta1"),
        (default.with(|config| config.beta2 = -0.1), "beta2"),
        (default.with(|config| config.weight_decay = f64::INFINITY), "weight_decay"),
        (default.with(|config| config.eps = 0.0), "eps"),
        (default.with(|config| config.max_grad_norm = f64::NAN), "max_grad_norm"),
    ] {
        let error = config.build(vec![]).expect_err(field);
        assert!(matches!(&error, Error::Invalid(invalid) if invalid.field == *field));
    }
}
