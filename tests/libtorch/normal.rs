//! Normal numbers are those of `Tensor::randn` to the bit, and so is the state that a generator is left in.

use ddil_libtorch::{
    Generator, default_generator_state, normal_is_vectorised, set_default_generator_state,
    set_num_threads,
};
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, in_own_process, refusal};

/// Sizes around groups of 16, blocks of 624 words and the chunks of 9984 per thread.
const SIZES: [i64; 27] = [
    0, 1, 15, 16, 17, 31, 32, 33, 511, 512, 513, 623, 624, 625, 1247, 1248, 1249, 9967, 9983, 9984,
    9985, 10_000, 19_967, 19_968, 19_985, 29_952, 100_003,
];

/// Words drawn before; the twister generates 624 at a time.
const EARLIER: [i64; 8] = [0, 1, 7, 16, 622, 623, 624, 625];

/// A part of a tensor, or the same in another order.
type Layout = fn(&Tensor) -> Tensor;

fn cpu(seed: u64) -> ddil_libtorch::Result<Generator> {
    Generator::new(Device::Cpu, seed)
}

/// Signed zeros and NaNs count, as a comparison of numbers would not have it.
fn bits(numbers: &Tensor) -> Tensor {
    match numbers.kind() {
        Kind::Float => numbers.contiguous().view_dtype(Kind::Int),
        Kind::Double => numbers.contiguous().view_dtype(Kind::Int64),
        _ => numbers.contiguous().view_dtype(Kind::Int16),
    }
}

/// What libtorch's own generator gives from the state of `generator`, and the state it ends in. For a process where
/// nothing else draws from it.
fn libtorchs(
    generator: &Generator,
    draw: impl FnOnce() -> Tensor,
) -> ddil_libtorch::Result<(Tensor, Tensor)> {
    set_default_generator_state(Device::Cpu, &generator.state()?)?;
    let drawn = draw();
    Ok((bits(&drawn), default_generator_state(Device::Cpu)?))
}

/// Draws `shape` from `generator` as from libtorch's own, and compares numbers and states.
fn compare(generator: &mut Generator, shape: &[i64], kind: Kind, what: &str) -> TestResult {
    let (expected, state) = libtorchs(generator, || Tensor::randn(shape, (kind, Device::Cpu)))?;
    let drawn = generator.normal(shape, kind)?;
    assert_eq!((drawn.size().as_slice(), drawn.kind()), (shape, kind), "{what}");
    assert_eq!(bits(&drawn), expected, "numbers: {shape:?}, {kind:?}, {what}");
    assert_eq!(generator.state()?, state, "state: {shape:?}, {kind:?}, {what}");
    Ok(())
}

#[test]
fn every_size_from_every_place_on_any_number_of_threads() -> TestResult {
    if in_own_process("normal::every_size_from_every_place_on_any_number_of_threads", &[], &[])? {
        return Ok(());
    }
    for threads in [1, 2, 5] {
        set_num_threads(threads)?;
        for earlier in EARLIER {
            for (seed, size) in (0..).zip(SIZES) {
                let mut generator = cpu(seed)?;
                drop(generator.uniform([earlier], Kind::Float)?);
                let what = format!("{threads} threads, {earlier} words before");
                compare(&mut generator, &[size], Kind::Float, &what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_stream_of_many_kinds_of_draws() -> TestResult {
    if in_own_process("normal::a_stream_of_many_kinds_of_draws", &[], &[])? {
        return Ok(());
    }
    for seed in [0, 1, 42, u64::from(u32::MAX), u64::MAX] {
        let mut generator = cpu(seed)?;
        for shape in [&[3_i64][..], &[2, 3, 5, 7], &[1_000_003], &[16], &[], &[4, 4, 64, 64]] {
            compare(&mut generator, shape, Kind::Float, &format!("seed {seed}"))?;
            // A single number leaves the other of its pair in the generator; nothing of Float may touch it.
            drop(generator.normal([1], Kind::Double)?);
            drop((generator.randperm(5)?, generator.randint(0, 7, [3])?));
            compare(&mut generator, &[40], Kind::Double, "between")?;
            compare(&mut generator, &[40], Kind::BFloat16, "between")?;
            compare(&mut generator, &[40], Kind::Half, "between")?;
        }
    }
    Ok(())
}

/// Angles and logarithms have 2^24 values each, of which 19 in 20 occur here; and a race between threads would show.
#[test]
fn a_hundred_million_numbers() -> TestResult {
    if in_own_process("normal::a_hundred_million_numbers", &[], &[])? {
        return Ok(());
    }
    set_num_threads(4)?;
    let mut generator = cpu(2026)?;
    for _ in 0..25 {
        compare(&mut generator, &[4_000_037], Kind::Float, "many")?;
    }
    Ok(())
}

/// The numbers cannot show whether the shim's loops are used, because they are the same.
#[test]
fn they_are_vectorised_where_a_processor_allows_it() -> TestResult {
    if std::env::var_os("ATEN_CPU_CAPABILITY").is_some() {
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    let able = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let able = false;
    assert_eq!(normal_is_vectorised()?, able);
    Ok(())
}

/// libtorch's plain loop rounds in other places than its vectorised one.
#[test]
fn libtorchs_own_loop_is_kept_where_its_numbers_are_others() -> TestResult {
    let name = "normal::libtorchs_own_loop_is_kept_where_its_numbers_are_others";
    if in_own_process(name, &[("ATEN_CPU_CAPABILITY", "default")], &[])? {
        return Ok(());
    }
    assert!(!normal_is_vectorised()?);
    for size in SIZES {
        compare(&mut cpu(3)?, &[size], Kind::Float, "the plain loop")?;
    }
    Ok(())
}

#[test]
fn a_tensor_is_filled_as_libtorch_fills_it() -> TestResult {
    if in_own_process("normal::a_tensor_is_filled_as_libtorch_fills_it", &[], &[])? {
        return Ok(());
    }
    let new = || Tensor::zeros([6, 8, 5, 4], kind::FLOAT_CPU);
    let layouts: [(&str, Layout); 6] = [
        ("whole", Tensor::shallow_clone),
        ("a row", |t| t.get(3)),
        ("transposed", |t| t.transpose(0, 3)),
        ("channels last", |t| ddil_libtorch::channels_last(t).expect("four dimensions")),
        ("every other", |t| t.slice(0, 1, 6, 2)),
        ("few", |t| t.get(1).get(2).get(3)),
    ];
    for (name, layout) in layouts {
        let mut generator = cpu(8)?;
        let (theirs, ours) = (new(), new());
        let (expected, state) = libtorchs(&generator, || layout(&theirs).normal_(0.0, 1.0))?;
        let mut target = layout(&ours);
        generator.fill_normal(&mut target)?;
        assert_eq!(bits(&target), expected, "{name}");
        assert_eq!(generator.state()?, state, "{name}");
        // Nothing around it has changed.
        assert_eq!(ours, theirs, "{name}");
    }
    Ok(())
}

#[test]
fn a_generator_fills_what_it_draws() -> TestResult {
    let mut filled = Tensor::empty([3, 70], kind::FLOAT_CPU);
    cpu(11)?.fill_normal(&mut filled)?;
    assert_eq!(filled, cpu(11)?.normal([3, 70], Kind::Float)?);
    Ok(())
}

#[test]
fn tensors_that_cannot_be_filled_are_refused_and_unchanged() -> TestResult {
    let mut generator = cpu(1)?;
    let state = generator.state()?;
    let mut leaf = Tensor::zeros([32], kind::FLOAT_CPU).set_requires_grad(true);
    let said = refusal(generator.fill_normal(&mut leaf));
    assert!(said.starts_with("Generator::fill_normal: ") && said.contains("in-place"), "{said}");
    refusal(generator.fill_normal(&mut Tensor::zeros([32], kind::INT64_CPU)));
    refusal(generator.fill_normal(&mut Tensor::zeros([1], kind::FLOAT_CPU).expand([32], false)));
    let said = refusal(generator.fill_normal(&mut Tensor::new()));
    assert!(said.contains("`tensor` is an undefined tensor"), "{said}");
    assert_eq!(generator.state()?, state);

    let _no_grad = tch::no_grad_guard();
    generator.fill_normal(&mut leaf)?;
    assert!(leaf.abs().max().double_value(&[]) > 0.5);
    Ok(())
}

#[test]
fn a_backward_pass_detects_that_a_tensor_was_filled() -> TestResult {
    let weight = Tensor::ones([32], kind::FLOAT_CPU).set_requires_grad(true);
    let mut noise = Tensor::ones([32], kind::FLOAT_CPU);
    let loss = (&weight * &noise).sum(Kind::Float);
    cpu(1)?.fill_normal(&mut noise)?;
    let error = loss.f_backward().expect_err("`noise` is needed as it was");
    assert!(error.to_string().contains("modified by an inplace operation"), "{error}");
    // The drawn numbers are constants for autograd.
    assert!(!cpu(1)?.normal([32], Kind::Float)?.requires_grad());
    Ok(())
}

/// A million numbers: the mean is accurate to .001 and a share to .0005, each one standard error.
#[test]
fn numbers_are_normal() -> TestResult {
    let x = cpu(17)?.normal([1_000_000], Kind::Float)?.to_kind(Kind::Double);
    let mean = |t: &Tensor| t.mean(Kind::Double).double_value(&[]);
    for (moment, expected, error) in
        [(1, 0.0, 0.005), (2, 1.0, 0.007), (3, 0.0, 0.02), (4, 3.0, 0.05)]
    {
        let found = mean(&x.pow_tensor_scalar(moment));
        assert!((found - expected).abs() < error, "moment {moment}: {found}");
    }
    for (bound, share) in [(0.5, 0.382_925), (1.0, 0.682_689), (2.0, 0.954_5), (3.0, 0.997_3)] {
        let found = mean(&x.abs().lt(bound).to_kind(Kind::Double));
        assert!((found - share).abs() < 0.0025, "within {bound}: {found}");
    }
    // Neighbours, and the two that are made of one radius.
    for distance in [1, 8] {
        let found = mean(&(x.slice(0, distance, None, 1) * x.slice(0, None, -distance, 1)));
        assert!(found.abs() < 0.005, "{distance} apart: {found}");
    }
    Ok(())
}
