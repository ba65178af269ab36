use std::ops::Range;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::{
    Autocast, Error, GroupNorm, channels_last, group_norm, is_channels_last, num_threads,
    set_num_threads,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, refusal};

pub(crate) const PLAIN: GroupNorm<'_> =
    GroupNorm { num_groups: 1, eps: 1e-5, weight: None, bias: None, offset: None, silu: false };

/// Memory layouts of maps in which the channels of a pixel are adjacent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layout {
    ChannelsLast,
    /// A part of a wider map.
    Cut,
}

pub(crate) const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

pub(crate) const LAYOUTS: [Layout; 2] = [Layout::ChannelsLast, Layout::Cut];

/// What has no images stays as it is.
pub(crate) fn laid_out(x: &Tensor, layout: Layout) -> Tensor {
    let side_by_side = |x: &Tensor| channels_last(x).expect("images or videos");
    match layout {
        _ if x.dim() < 4 => x.shallow_clone(),
        Layout::ChannelsLast => side_by_side(x),
        Layout::Cut => side_by_side(&Tensor::cat(&[x, x], -1)).narrow(-1, 1, x.size()[x.dim() - 1]),
    }
}

/// Whether the operation applies to this tensor: not to others, nor if the layout is ambiguous for lack of channels.
pub(crate) fn is_ours(x: &Tensor) -> bool {
    let size = x.size();
    size[2..].iter().product::<i64>() == 1 || (size.len() > 3 && size[1] > 1 && x.stride()[1] == 1)
}

/// The inputs of a norm of `channels` channels in addition to `x`.
#[derive(Debug)]
pub(crate) struct Learned {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) offset: Tensor,
}

impl Learned {
    pub(crate) fn new(batch: i64, channels: i64, kinds: [Kind; 2]) -> Self {
        let randn = |shape: &[i64]| Tensor::randn(shape, kind::FLOAT_CPU);
        Self {
            weight: (randn(&[channels]) + 1.0).to_kind(kinds[1]),
            bias: randn(&[channels]).to_kind(kinds[1]),
            offset: randn(&[batch, channels]).to_kind(kinds[0]),
        }
    }

    pub(crate) fn doubles(&self) -> Self {
        let [weight, bias, offset] =
            [&self.weight, &self.bias, &self.offset].map(|t| t.to_kind(Kind::Double));
        Self { weight, bias, offset }
    }

    pub(crate) fn settings(&self, num_groups: i64) -> GroupNorm<'_> {
        let (weight, bias) = (Some(&self.weight), Some(&self.bias));
        GroupNorm { num_groups, weight, bias, offset: Some(&self.offset), silu: true, ..PLAIN }
    }
}

/// The same in doubles, by plain operations.
pub(crate) fn plainly(x: &Tensor, settings: &GroupNorm<'_>) -> Tensor {
    let doubles = |t: &Tensor| t.to_kind(Kind::Double);
    let size = x.size();
    let along = |t: &Tensor, batch: i64| {
        let mut shape = vec![1; size.len()];
        (shape[0], shape[1]) = (batch, size[1]);
        doubles(t).reshape(shape)
    };
    let x = doubles(x);
    let y = settings.offset.map_or_else(|| x.shallow_clone(), |offset| &x + along(offset, size[0]));
    let groups = y.reshape([size[0], settings.num_groups, -1]);
    let mean = groups.mean_dim([2_i64].as_slice(), true, Kind::Double);
    let variance = groups.var_dim([2_i64].as_slice(), false, true);
    let y = ((groups - mean) / (variance + settings.eps).sqrt()).reshape(&size);
    let [weight, bias] = [settings.weight, settings.bias].map(|t| t.map(|t| along(t, 1)));
    let y = weight.map_or(y.shallow_clone(), |weight| y * weight);
    let y = bias.map_or(y.shallow_clone(), |bias| y + bias);
    if settings.silu { y.sigmoid() * y } else { y }
}

/// Half of the distance between neighbouring numbers, as a share of them.
pub(crate) fn rounding(kind: Kind) -> f64 {
    match kind {
        Kind::Float => 0.0,
        Kind::BFloat16 => 1.0 / 256.0,
        _ => 1.0 / 2048.0,
    }
}

/// Everywhere within one rounding to the kind, but for `share` of the number or of 1.
fn assert_near(found: &Tensor, expected: &Tensor, share: f64, what: &str) {
    let kind = found.kind();
    let found = found.to_kind(Kind::Double);
    let allowed = expected.abs() * rounding(kind) + expected.abs().clamp_min(1.0) * share;
    let excess = ((&found - expected).abs() - allowed).max().double_value(&[]);
    assert!(excess <= 0.0, "{what}: {excess:e} more than allowed");
}

/// Maps and the other inputs of a norm.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) x: Tensor,
    pub(crate) learned: Learned,
    groups: i64,
    /// Whether there are weight, bias and offset, and whether `SiLU` follows.
    pub(crate) parts: [bool; 4],
}

impl Case {
    pub(crate) fn settings(&self) -> GroupNorm<'_> {
        let [weight, bias, offset, silu] = self.parts;
        let all = self.learned.settings(self.groups);
        GroupNorm {
            weight: all.weight.filter(|_| weight),
            bias: all.bias.filter(|_| bias),
            offset: all.offset.filter(|_| offset),
            silu,
            ..all
        }
    }
}

/// Any kind, memory layout and parts, with this many dimensions in addition to batch and channels.
pub(crate) fn any_case(sides: Range<usize>, lengths: Range<i64>) -> impl Strategy<Value = Case> {
    let sizes = ([1_i64..4, 1_i64..5, 1_i64..5], prop::collection::vec(lengths, sides));
    let kinds = (prop::sample::select(KINDS.to_vec()), any::<bool>());
    let layouts = prop::sample::select(LAYOUTS.to_vec());
    (sizes, kinds, layouts, any::<[bool; 4]>()).prop_map(|(sizes, kinds, layout, parts)| {
        let (([batch, groups, of_group], pixels), (kind, has_kind_of_x)) = (sizes, kinds);
        let channels = groups * of_group;
        let numbers = Tensor::randn([vec![batch, channels], pixels].concat(), kind::FLOAT_CPU);
        let x = laid_out(&(numbers * 2.0 + 0.5).to_kind(kind), layout);
        let of_weights = if has_kind_of_x { kind } else { Kind::Float };
        Case { x, learned: Learned::new(batch, channels, [kind, of_weights]), groups, parts }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// For any rank, memory layout, kinds and present parts: the values in double precision, rounded once.
    #[test]
    fn it_is_the_formula(case in any_case(0..4, 1..10)) {
        let (x, settings) = (&case.x, case.settings());
        let y = group_norm(x, &settings)?;
        prop_assert_eq!((y.kind(), y.size()), (x.kind(), x.size()));
        let ours = is_ours(x);
        // libtorch rounds more than once, and few numbers, which may be as good as the same, magnify that.
        let share = if ours { 2e-5 } else { 5e-2 };
        if ours || x.numel() as i64 / (x.size()[0] * settings.num_groups) > 6 {
            assert_near(&y, &plainly(x, &settings), share, &format!("{:?} {settings:?}", x.size()));
        }
    }
}

/// More than one block, more than one chunk, odd remainders, groups of one channel, one pixel, wide maps.
pub(crate) const SHAPES: [([i64; 4], i64); 10] = [
    ([1, 2, 1, 7], 1),
    ([3, 6, 1, 1], 3),
    ([2, 8, 5, 7], 8),
    ([1, 32, 32, 32], 8),
    ([2, 48, 31, 33], 8),
    ([1, 4, 301, 299], 2),
    ([1, 3, 77, 1001], 1),
    ([2, 640, 9, 3], 32),
    ([1, 1280, 8, 8], 32),
    ([5, 320, 1, 1], 32),
];

#[test]
fn it_is_the_formula_at_many_sizes() -> TestResult {
    for (shape, groups) in SHAPES {
        for kind in KINDS {
            let x = (Tensor::randn(shape, kind::FLOAT_CPU) * 3.0 - 1.0).to_kind(kind);
            let learned = Learned::new(shape[0], shape[1], [kind, Kind::Float]);
            for layout in LAYOUTS {
                let (settings, x) = (learned.settings(groups), laid_out(&x, layout));
                let what = format!("{shape:?} {kind:?} {layout:?}");
                assert_near(&group_norm(&x, &settings)?, &plainly(&x, &settings), 1e-5, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_bit() -> TestResult {
    let before = num_threads()?;
    for (shape, groups) in SHAPES {
        let x = Tensor::randn(shape, kind::FLOAT_CPU);
        let learned = Learned::new(shape[0], shape[1], [Kind::Float; 2]);
        for layout in LAYOUTS {
            let x = laid_out(&x, layout);
            let mut answers = Vec::new();
            for threads in [1, 2, 3] {
                set_num_threads(threads)?;
                answers.push(group_norm(&x, &learned.settings(groups))?);
            }
            set_num_threads(before)?;
            assert_eq!(answers[0], answers[1], "{shape:?} {layout:?}");
            assert_eq!(answers[0], answers[2], "{shape:?} {layout:?}");
        }
    }
    Ok(())
}

/// 1000 +- 0.01: in float the difference from the mean has two or three digits, and they must be kept.
#[test]
fn a_small_variance_around_a_large_mean_is_found() -> TestResult {
    for layout in LAYOUTS {
        let x = Tensor::randn([2, 32, 40, 40], kind::FLOAT_CPU) * 0.01 + 1000.0;
        let x = laid_out(&x, layout);
        let settings = GroupNorm { num_groups: 8, ..PLAIN };
        let expected = plainly(&x, &settings);
        assert_near(&group_norm(&x, &settings)?, &expected, 2e-6, &format!("{layout:?}"));
    }
    Ok(())
}

/// A few pixels, from which others are measured, are unlike all others.
#[test]
fn pixels_that_stand_out_do_not_spoil_the_rest() -> TestResult {
    for layout in LAYOUTS {
        let x = Tensor::randn([1, 16, 64, 64], kind::FLOAT_CPU);
        let _ = x.narrow(2, 0, 1).narrow(3, 0, 4).g_add_scalar_(1e4);
        let x = laid_out(&x, layout);
        let settings = GroupNorm { num_groups: 4, ..PLAIN };
        let expected = plainly(&x, &settings);
        assert_near(&group_norm(&x, &settings)?, &expected, 1e-6, &format!("{layout:?}"));
    }
    Ok(())
}

/// Their squares are beyond the range of floats.
#[test]
fn huge_and_tiny_numbers_are_normalised() -> TestResult {
    for (size, eps) in [(1e30, 1e-5), (1e22, 1e-5), (1e-30, 1e-5), (1e-12, 0.0)] {
        for layout in LAYOUTS {
            let x = Tensor::randn([2, 8, 9, 9], kind::FLOAT_CPU) * size;
            let x = laid_out(&x, layout);
            let settings = GroupNorm { num_groups: 2, eps, silu: true, ..PLAIN };
            let expected = plainly(&x, &settings);
            let what = format!("{size:e} {layout:?}");
            assert_near(&group_norm(&x, &settings)?, &expected, 1e-6, &what);
        }
    }
    Ok(())
}

#[test]
fn a_constant_group_becomes_the_bias() -> TestResult {
    let bias = Tensor::from_slice(&[0.5_f32, -2.0]);
    for value in [0.0, 3.0, 1e6, 1e30] {
        let x = channels_last(&Tensor::full([1, 2, 13, 11], value, kind::FLOAT_CPU))?;
        let y = group_norm(&x, &GroupNorm { bias: Some(&bias), ..PLAIN })?;
        assert_eq!(y, bias.view([1, 2, 1, 1]).expand_as(&y), "{value:e}");
    }
    Ok(())
}

#[test]
fn non_finite_values_stay_in_their_group() -> TestResult {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for kind in KINDS {
            for layout in LAYOUTS {
                let x = laid_out(&Tensor::randn([2, 6, 9, 10], (kind, Device::Cpu)), layout);
                let settings = GroupNorm { num_groups: 3, silu: true, ..PLAIN };
                let before = group_norm(&x, &settings)?;
                let _ = x.get(1).get(3).get(8).narrow(0, 9, 1).fill_(value);
                let after = group_norm(&x, &settings)?;
                let what = format!("{value} {kind:?} {layout:?}");
                let nan = after.isnan();
                assert_eq!(nan.sum(Kind::Int64).int64_value(&[]), 2 * 90, "{what}");
                assert!(nan.get(1).narrow(0, 2, 2).all().int64_value(&[]) == 1, "{what}");
                let unchanged = before.eq_tensor(&after).logical_or(&nan);
                assert!(unchanged.all().int64_value(&[]) == 1, "{what}");
            }
        }
    }
    Ok(())
}

/// Each value is its own group, so the output of the norm is the bias.
fn silu_of(values: &[f32]) -> ddil_libtorch::Result<Vec<f32>> {
    let channels = values.len() as i64;
    let bias = Tensor::from_slice(values);
    let x = Tensor::zeros([1, channels], kind::FLOAT_CPU);
    let settings = GroupNorm { num_groups: channels, bias: Some(&bias), silu: true, ..PLAIN };
    Ok(Vec::try_from(group_norm(&x, &settings)?.flatten(0, -1)).expect("floats"))
}

#[test]
fn silu_is_right_to_a_few_bits_everywhere() -> TestResult {
    let values: Vec<f32> = (-120_000..120_000).map(|i| i as f32 * 1e-3).collect();
    for (&y, found) in values.iter().zip(silu_of(&values)?) {
        let expected = f64::from(y) / (1.0 + (-f64::from(y)).exp());
        let apart = (f64::from(found) - expected).abs();
        // Below -88 it is 0.
        assert!(apart <= expected.abs() * 4e-7 + 6e-37, "silu({y}) is {found:e}, not {expected:e}");
    }
    Ok(())
}

/// Ties, subnormal and huge numbers, NaNs of all bits.
#[test]
fn numbers_are_rounded_as_libtorch_rounds_them() -> TestResult {
    let bits = (0..=u32::MAX).step_by(0x1000).flat_map(|bits| [bits, bits | 0xfff]);
    let values: Vec<f32> = bits.map(f32::from_bits).collect();
    let (bias, channels) = (Tensor::from_slice(&values), values.len() as i64);
    for kind in [Kind::BFloat16, Kind::Half] {
        let x = Tensor::zeros([1, channels], (kind, Device::Cpu));
        let settings = GroupNorm { num_groups: channels, bias: Some(&bias), ..PLAIN };
        let (y, expected) = (group_norm(&x, &settings)?.get(0), bias.to_kind(kind));
        let same = y.eq_tensor(&expected).logical_or(&y.isnan().logical_and(&expected.isnan()));
        assert_eq!(same.all().int64_value(&[]), 1, "{kind:?}");
    }
    Ok(())
}

#[test]
fn silu_is_right_at_the_ends() -> TestResult {
    let found = silu_of(&[f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 0.0, f32::NAN])?;
    assert_eq!(found[..5], [f32::INFINITY, 0.0, 1e38, 0.0, 0.0]);
    assert!(found[5].is_nan());
    Ok(())
}

#[test]
fn an_offset_is_the_same_as_adding_it_before() -> TestResult {
    for layout in LAYOUTS {
        let x = laid_out(&Tensor::randn([2, 32, 12, 10], kind::FLOAT_CPU), layout);
        let learned = Learned::new(2, 32, [Kind::Float; 2]);
        let settings = learned.settings(8);
        let sum = &x + learned.offset.view([2, 32, 1, 1]);
        let expected = group_norm(&sum, &GroupNorm { offset: None, ..settings })?;
        assert_near(&group_norm(&x, &settings)?, &expected, 2e-6, &format!("{layout:?}"));
    }
    Ok(())
}

#[test]
fn the_order_in_memory_stays() -> TestResult {
    let settings = GroupNorm { num_groups: 2, ..PLAIN };
    let images = Tensor::randn([2, 4, 3, 5], kind::FLOAT_CPU);
    let videos = Tensor::randn([2, 4, 3, 5, 2], kind::FLOAT_CPU);
    for x in [&images, &videos] {
        assert_eq!(group_norm(x, &settings)?.stride(), x.stride());
        let x = channels_last(x)?;
        assert_eq!(group_norm(&x, &settings)?.stride(), x.stride());
    }
    assert!(group_norm(&images.transpose(2, 3), &settings)?.is_contiguous());
    // A part of a map has no gaps any more.
    assert!(is_channels_last(&group_norm(&laid_out(&images, Layout::Cut), &settings)?));
    Ok(())
}

/// As a network under autocast has it: maps of 16 bits, weights of 32.
#[test]
fn kinds_are_libtorchs_under_autocast() -> TestResult {
    let learned = Learned::new(2, 8, [Kind::BFloat16, Kind::Float]);
    let settings = GroupNorm { offset: None, ..learned.settings(4) };
    for kind in [Kind::BFloat16, Kind::Float] {
        let x = channels_last(&Tensor::randn([2, 8, 4, 4], kind::FLOAT_CPU).to_kind(kind))?;
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
        let libtorch =
            x.group_norm(4, Some(&learned.weight), Some(&learned.bias), 1e-5, true).silu();
        let ours = group_norm(&x, &settings)?;
        assert_eq!((ours.kind(), ours.kind()), (libtorch.kind(), kind));
        assert_near(&ours, &libtorch.to_kind(Kind::Double), 2e-2, &format!("{kind:?}"));
    }
    Ok(())
}

#[test]
fn channels_one_after_the_other_are_libtorchs_to_the_bit() -> TestResult {
    let x = Tensor::randn([2, 8, 5, 6], kind::FLOAT_CPU);
    let learned = Learned::new(2, 8, [Kind::Float; 2]);
    let sum = &x + learned.offset.view([2, 8, 1, 1]);
    let libtorch = sum.group_norm(4, Some(&learned.weight), Some(&learned.bias), 1e-5, true).silu();
    assert_eq!(group_norm(&x, &learned.settings(4))?, libtorch);
    Ok(())
}

/// libtorch's operations compute the cases that the operation does not cover.
#[test]
fn other_kinds_and_empty_batches_are_libtorchs() -> TestResult {
    let x = Tensor::randn([2, 4, 3, 3], kind::DOUBLE_CPU);
    let settings = GroupNorm { num_groups: 2, silu: true, ..PLAIN };
    let y = group_norm(&x, &settings)?;
    assert_eq!(y.kind(), Kind::Double);
    assert!((y - plainly(&x, &settings)).abs().max().double_value(&[]) < 1e-12);
    let empty = Tensor::zeros([0, 4, 3, 3], kind::FLOAT_CPU);
    assert_eq!(group_norm(&empty, &settings)?.size(), [0, 4, 3, 3]);
    // The sum is of the wider kind.
    let offset = Tensor::ones([2, 4], kind::FLOAT_CPU);
    let settings = GroupNorm { offset: Some(&offset), ..settings };
    let x = channels_last(&x.to_kind(Kind::BFloat16))?;
    assert_eq!(group_norm(&x, &settings)?.kind(), Kind::Float);
    Ok(())
}

#[test]
fn mismatches_are_refused() {
    let x = Tensor::ones([2, 4, 3, 3], kind::FLOAT_CPU);
    let [four, three] = [4, 3].map(|n| Tensor::ones([n], kind::FLOAT_CPU));
    let said = |x: &Tensor, settings: GroupNorm<'_>| refusal(group_norm(x, &settings));
    assert!(said(&Tensor::new(), PLAIN).contains("`x` is an undefined tensor"));
    let undefined = Tensor::new();
    assert!(said(&x, GroupNorm { bias: Some(&undefined), ..PLAIN }).contains("`bias` is an und"));
    assert!(said(&four, PLAIN).contains("`x` has shape [4]"));
    for num_groups in [3, 0, -2, 8, i64::MIN] {
        let said = said(&x, GroupNorm { num_groups, ..PLAIN });
        assert!(said.starts_with("group_norm: Expected num"), "{said}");
    }
    let said_of_weight = said(&x, GroupNorm { weight: Some(&three), ..PLAIN });
    assert!(said_of_weight.contains("Expected weight to be a vector"), "{said_of_weight}");
    let doubles = four.to_kind(Kind::Double);
    said(&x, GroupNorm { weight: Some(&doubles), ..PLAIN });
    let said_of_offset = said(&x, GroupNorm { offset: Some(&four), ..PLAIN });
    assert!(said_of_offset.contains("`offset` has shape [4]"), "{said_of_offset}");
    said(&x.to_kind(Kind::Int64), PLAIN);
    for eps in [-1e-5, f64::NAN, f64::INFINITY] {
        let result = group_norm(&x, &GroupNorm { eps, ..PLAIN });
        assert!(matches!(result, Err(Error::Argument(ArgumentError::Value { name: "eps", .. }))));
    }
}

/// libtorch's own operations do it there.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_normalises_as_the_cpu_does() -> TestResult {
    for kind in KINDS {
        let x = Tensor::randn([2, 32, 8, 8], (kind, Device::Cpu));
        let learned = Learned::new(2, 32, [kind; 2]);
        let expected = plainly(&x, &learned.settings(8));
        let on_gpu = |t: &Tensor| t.to_device(Device::Cuda(0));
        let learned = Learned {
            weight: on_gpu(&learned.weight),
            bias: on_gpu(&learned.bias),
            offset: on_gpu(&learned.offset),
        };
        let y = group_norm(&on_gpu(&x), &learned.settings(8))?;
        assert_eq!((y.device(), y.kind()), (Device::Cuda(0), kind));
        let share = if kind == Kind::Float { 1e-4 } else { 4e-2 };
        assert_near(&y.to_device(Device::Cpu), &expected, share, &format!("{kind:?}"));
    }
    Ok(())
}
