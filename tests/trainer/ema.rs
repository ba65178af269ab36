use ddil_trainer::{EmaConfig, Error};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

use crate::TestResult;

fn named(tensor: &Tensor) -> Vec<(String, Tensor)> {
    vec![("weight".into(), tensor.shallow_clone())]
}

fn set(tensor: &Tensor, value: f64) {
    let _guard = tch::no_grad_guard();
    let _ = tensor.shallow_clone().fill_(value);
}

#[test]
fn moves_as_the_formula_says_with_and_without_warmup() -> TestResult {
    for warmup in [false, true] {
        let weight = Tensor::zeros([2], (Kind::Double, tch::Device::Cpu)).set_requires_grad(true);
        let mut ema = EmaConfig::default()
            .with(|config| {
                config.decay = 0.9;
                config.warmup = warmup;
            })
            .build(named(&weight))?;
        let mut expected = 0.0;
        for n in 0..200 {
            set(&weight, f64::from(n));
            let decay = if warmup { (1.0 + f64::from(n)) / (10.0 + f64::from(n)) } else { 0.9 };
            let decay = f64::min(decay, 0.9);
            assert!((ema.decay() - decay).abs() < 1e-15);
            expected = decay * expected + (1.0 - decay) * f64::from(n);
            ema.update()?;
        }
        assert!((ema.tensors()[0].1.double_value(&[1]) - expected).abs() < 1e-9);
        assert!(!ema.tensors()[0].1.requires_grad());
    }
    Ok(())
}

#[test]
fn whole_numbers_are_copied_and_half_precision_is_averaged_in_float() -> TestResult {
    let count = Tensor::zeros([1], (Kind::Int64, tch::Device::Cpu));
    let half = Tensor::ones([1], (Kind::BFloat16, tch::Device::Cpu));
    let tensors = vec![
        ("half".to_owned(), half.shallow_clone()),
        ("count".to_owned(), count.shallow_clone()),
    ];
    let mut ema = EmaConfig::default()
        .with(|config| {
            config.decay = 0.999;
            config.warmup = false;
        })
        .build(tensors)?;
    set(&count, 7.0);
    set(&half, 2.0);
    ema.update()?;
    let [(_, count_average), (_, half_average)] = ema.tensors() else { panic!("two averages") };
    assert_eq!((count_average.kind(), count_average.int64_value(&[0])), (Kind::Int64, 7));
    // 1.001 is not a number in 16 bits.
    assert_eq!(half_average.kind(), Kind::Float);
    assert!((half_average.double_value(&[0]) - 1.001).abs() < 1e-6);
    Ok(())
}

#[test]
fn applied_averages_are_undone_to_the_bit() -> TestResult {
    let weight = (Tensor::rand([64], FLOAT_CPU) * 3.0).set_requires_grad(true);
    let mut ema = EmaConfig::default()
        .with(|config| {
            config.decay = 0.7;
            config.warmup = false;
        })
        .build(named(&weight))?;
    let trained = weight.detach().copy() * 1.7;
    {
        let _guard = tch::no_grad_guard();
        weight.shallow_clone().copy_(&trained);
    }
    ema.update()?;
    let applied = ema.apply()?;
    assert_eq!(weight.detach(), ema.tensors()[0].1);
    drop(applied);
    assert_eq!(weight.detach(), trained);
    assert!(weight.requires_grad());
    Ok(())
}

#[test]
fn a_loaded_optimizer_continues_exactly() -> TestResult {
    let weight = Tensor::zeros([3], FLOAT_CPU);
    let config = EmaConfig::default().with(|config| {
        config.decay = 0.99;
        config.warmup = true;
    });
    let mut ema = config.build(named(&weight))?;
    set(&weight, 1.0);
    ema.update()?;
    let saved = vec![("weight".to_owned(), ema.tensors()[0].1.copy())];
    let mut other = config.build(named(&weight))?;
    other.load(&saved, ema.num_updates())?;
    ema.update()?;
    other.update()?;
    assert_eq!(ema.tensors(), other.tensors());
    assert_eq!(other.num_updates(), 2);

    let target = Tensor::zeros([3], FLOAT_CPU);
    ema.copy_to(&named(&target))?;
    assert_eq!(target, ema.tensors()[0].1);
    let error = other.load(&named(&Tensor::zeros([4], FLOAT_CPU)), 1).expect_err("another shape");
    assert!(matches!(error, Error::StateMismatch { .. }));
    Ok(())
}

#[test]
fn an_impossible_decay_is_refused() {
    for decay in [-0.1, 1.1, f64::NAN] {
        assert!(
            EmaConfig::default()
                .with(|config| {
                    config.decay = decay;
                    config.warmup = false;
                })
                .build(vec![])
                .is_err()
        );
    }
}
