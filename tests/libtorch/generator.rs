//! The numbers are those of `PyTorch` 2.13.0, drawn on the CPU with `torch.Generator().manual_seed(seed)`.

use ddil_libtorch::{Error, Generator, default_generator_state, set_default_generator_state};
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, in_own_process, max_difference, refusal};

/// `torch.randn(5, generator=g)`, seed 0.
const NORMAL_5: [f32; 5] = [1.540_996_1, -0.293_428_9, -2.178_789_4, 0.568_431_26, -1.084_522_4];

/// `torch.randn(2, 10, generator=g)`, seed 42: from 16 elements on libtorch draws in blocks.
const NORMAL_20: [f32; 20] = [
    1.926_915_3,
    1.487_284_1,
    0.900_717_2,
    -2.105_521,
    -0.758_131_15,
    1.078_317_6,
    0.800_800_56,
    1.680_620_6,
    0.355_859_9,
    -0.686_623,
    -0.493_356_35,
    0.241_487_79,
    -0.231_624_32,
    0.041_759_49,
    -0.251_575_3,
    0.859_858_5,
    -0.309_726_77,
    -0.395_710_5,
    0.803_409_34,
    -0.621_595_4,
];

/// `torch.randn(3, generator=g, dtype=torch.float64)`, seed 2**40 + 3.
const DOUBLE_3: [f64; 3] =
    [0.803_276_078_096_350_7, 0.174_833_393_279_103_58, 0.088_978_095_025_878_93];

fn cpu(seed: u64) -> ddil_libtorch::Result<Generator> {
    Generator::new(Device::Cpu, seed)
}

#[test]
fn normal_numbers_are_pytorchs() -> TestResult {
    let drawn = cpu(0)?.normal([5], Kind::Float)?;
    assert!(max_difference(&drawn, &Tensor::from_slice(&NORMAL_5)) < 1e-6);
    let drawn = cpu(42)?.normal([2, 10], Kind::Float)?;
    assert!(max_difference(&drawn, &Tensor::from_slice(&NORMAL_20).view([2, 10])) < 1e-6);
    let drawn = cpu((1 << 40) + 3)?.normal([3], Kind::Double)?;
    assert!(max_difference(&drawn, &Tensor::from_slice(&DOUBLE_3)) < 1e-14);
    Ok(())
}

/// One stream, four kinds of draws in turn, seed 7.
#[test]
fn a_stream_continues_as_pytorchs_does() -> TestResult {
    let mut generator = cpu(7)?;
    let uniform = generator.uniform([4], Kind::Float)?;
    let expected = [0.534_922_54_f32, 0.198_803_19, 0.659_211_7, 0.656_890_3];
    assert!(max_difference(&uniform, &Tensor::from_slice(&expected)) < 1e-7);

    let whole = generator.randint(-5, 1000, [6])?;
    assert_eq!(Vec::<i64>::try_from(whole)?, [353, 682, 282, 339, 308, 141]);
    let order = generator.randperm(8)?;
    assert_eq!(Vec::<i64>::try_from(order)?, [6, 7, 4, 5, 0, 2, 3, 1]);

    let normal = generator.normal([3], Kind::Float)?;
    let expected = [-1.717_699_6_f32, -1.007_351, -0.436_211_94];
    assert!(max_difference(&normal, &Tensor::from_slice(&expected)) < 1e-6);
    Ok(())
}

#[test]
fn a_saved_state_continues_to_the_bit() -> TestResult {
    let mut generator = cpu(3)?;
    // An odd number of draws leaves half a pair of normal numbers inside.
    drop(generator.normal([3], Kind::Float)?);
    let state = generator.state()?;
    let draw = |generator: &mut Generator| -> ddil_libtorch::Result<_> {
        let numbers = generator.normal([7], Kind::Float)?;
        Ok((numbers, generator.randperm(9)?))
    };
    let expected = draw(&mut generator)?;

    let mut resumed = cpu(99)?;
    resumed.set_state(&state)?;
    assert_eq!(draw(&mut resumed)?, expected);
    assert_eq!(resumed.state()?, generator.state()?);
    Ok(())
}

/// A state contains the number of its words that are left; libtorch would read past their end if it trusted it.
#[test]
fn a_damaged_state_is_refused() -> TestResult {
    let mut generator = cpu(1)?;
    let (expected, damaged) = (generator.state()?, generator.state()?);
    // Bytes 8 to 12 are the number of words left plus one, 16 to 24 the position of the next.
    for (byte, value) in [(8, 88), (9, 2), (16, 1), (17, 2)] {
        drop(damaged.get(byte).fill_(value));
    }
    let said = refusal(generator.set_state(&damaged));
    assert!(said.contains("599 words are left from word 513, but there are 624"), "{said}");
    assert!(set_default_generator_state(Device::Cpu, &damaged).is_err());
    assert_eq!(generator.state()?, expected);
    Ok(())
}

#[test]
fn streams_are_independent() -> TestResult {
    let (mut one, mut other) = (cpu(5)?, cpu(5)?);
    drop(other.normal([2], Kind::Float)?);
    assert_eq!(one.normal([4], Kind::Float)?, cpu(5)?.normal([4], Kind::Float)?);
    assert_eq!(one.device(), Device::Cpu);
    Ok(())
}

#[test]
fn shapes_and_ranges() -> TestResult {
    let mut generator = cpu(1)?;
    assert_eq!(generator.normal([0_i64; 0], Kind::BFloat16)?.size(), Vec::<i64>::new());
    assert_eq!(generator.normal([2, 0], Kind::Float)?.size(), [2, 0]);
    let uniform = generator.uniform([1000], Kind::Float)?;
    assert!(uniform.min().double_value(&[]) >= 0.0 && uniform.max().double_value(&[]) < 1.0);
    let whole = generator.randint(2, 5, [1000])?;
    assert_eq!((whole.min().int64_value(&[]), whole.max().int64_value(&[])), (2, 4));
    Ok(())
}

#[test]
fn invalid_draws_are_refused() -> TestResult {
    let mut generator = cpu(1)?;
    let said = refusal(generator.normal([2], Kind::Int64));
    assert!(said.starts_with("Generator::normal: ") && !said.contains("frame #"), "{said}");
    refusal(generator.normal([-2], Kind::Float));
    refusal(generator.randint(5, 5, [2]));
    refusal(generator.randperm(-1));
    refusal(generator.set_state(&Tensor::zeros([3], (Kind::Uint8, Device::Cpu))));
    refusal(generator.set_state(&Tensor::zeros([3], kind::FLOAT_CPU)));
    refusal(generator.set_state(&Tensor::new()));
    assert!(matches!(Generator::new(Device::Mps, 0), Err(Error::UnsupportedDevice { .. })));
    if !ddil_libtorch::cuda_built() {
        assert!(matches!(Generator::new(Device::Cuda(0), 0), Err(Error::Torch { .. })));
        assert!(matches!(default_generator_state(Device::Cuda(0)), Err(Error::Torch { .. })));
    }
    Ok(())
}

/// In a separate process: other draws from the default generator would disturb it.
#[test]
fn the_default_generator_continues_to_the_bit() -> TestResult {
    if in_own_process("generator::the_default_generator_continues_to_the_bit", &[], &[])? {
        return Ok(());
    }
    tch::manual_seed(0);
    let first = Tensor::randn([5], kind::FLOAT_CPU);
    assert!(max_difference(&first, &Tensor::from_slice(&NORMAL_5)) < 1e-6);
    let state = default_generator_state(Device::Cpu)?;
    let expected = Tensor::randn([33], kind::FLOAT_CPU);
    assert_ne!(default_generator_state(Device::Cpu)?, state);
    set_default_generator_state(Device::Cpu, &state)?;
    assert_eq!(Tensor::randn([33], kind::FLOAT_CPU), expected);
    // A separate stream does not affect it.
    let before = default_generator_state(Device::Cpu)?;
    drop(cpu(1)?.normal([8], Kind::Float)?);
    assert_eq!(default_generator_state(Device::Cpu)?, before);
    Ok(())
}

/// The stream of a device is another one than the CPU's, and as much its own: the same twice, moments of a normal
/// distribution, to be continued from a saved state.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_has_streams_of_its_own() -> TestResult {
    let gpu = Device::Cuda(0);
    let [mut first, mut second] = [Generator::new(gpu, 5)?, Generator::new(gpu, 5)?];
    let (once, twice) =
        (first.normal([1 << 16], Kind::Float)?, second.normal([1 << 16], Kind::Float)?);
    assert_eq!(once.device(), gpu);
    assert_eq!(once, twice);
    assert!(once.mean(Kind::Double).double_value(&[]).abs() < 5.0 / 256.0);
    assert!((once.std(true).double_value(&[]) - 1.0).abs() < 0.02);
    let saved = first.state()?;
    assert_eq!(saved.device(), Device::Cpu);
    let expected =
        (first.uniform([7], Kind::Float)?, first.randint(0, 100, [9])?, first.randperm(11)?);
    second.set_state(&saved)?;
    let found =
        (second.uniform([7], Kind::Float)?, second.randint(0, 100, [9])?, second.randperm(11)?);
    assert_eq!(found, expected);
    assert!(
        max_difference(&expected.2.sort(0, false).0, &Tensor::arange(11, (Kind::Int64, gpu)))
            == 0.0
    );
    Ok(())
}
