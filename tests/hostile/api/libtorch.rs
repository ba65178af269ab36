use ddil_libtorch::{
    AdamW, ArgumentError, Autocast, Clamped, Generator, GroupNorm, MappedFile, MemoryFormat,
    RowFile, TensorList, affine, affine_, affine_clamped, affine_clamped_, affine_four,
    affine_four_, affine_noise, affine_noise_, channels_last, clip_grad_norm_, copy_rows_,
    decode_jpeg, default_generator_state, deterministic, drop_grads, ensure_dense, ensure_kind,
    ensure_real, ensure_same_shape, ensure_script_archive, ensure_shape, ensure_timesteps,
    foreach_lerp_, foreach_zero_, fused_adamw_, gather_rows, grad_norm, grads, group_norm,
    is_channels_last, is_sole_owner, recomputed, set_default_generator_state,
    set_num_interop_threads, set_num_threads, to_memory_format,
};
use tch::{Device, Kind, Tensor, kind};

use crate::inputs::repository;

use super::cases::{Cases, ODD_WHOLES, outcome};

fn images() -> Tensor {
    Tensor::ones([2, 3, 4, 4], kind::FLOAT_CPU)
}

#[test]
fn ddil_libtorch() {
    let mut cases = Cases::default();
    arithmetic(&mut cases);
    normalisation(&mut cases);
    lists(&mut cases);
    generators(&mut cases);
    recomputation(&mut cases);
    arguments(&mut cases);
    files(&mut cases);
    row_files(&mut cases);
    the_process(&mut cases);
    cases.finish("ddil-libtorch");
}

fn arithmetic(cases: &mut Cases) {
    let x = images();
    let numbers = Clamped { a: 1.0, b: 0.5, lo: -1.0, hi: 1.0, c: 0.5, d: 0.5 };
    let (two, three) = ([&x, &x], [&x, &x, &x]);
    cases.tensors("affine", &two, |t| outcome(affine(&t[0], &t[1], 0.5, 2.0)));
    cases.tensors("affine_noise", &three, |t| {
        outcome(affine_noise(&t[0], &t[1], &t[2], 0.5, 2.0, 1.0))
    });
    cases.tensors("affine_four", &[&x; 4], |t| {
        outcome(affine_four([&t[0], &t[1], &t[2], &t[3]], [0.5, 2.0, 1.0, -1.0]))
    });
    cases.tensors("affine_clamped", &two, |t| outcome(affine_clamped(&t[0], &t[1], &numbers)));
    cases.tensors("is_sole_owner", &two, |t| {
        let _ = is_sole_owner(&t[0]);
        Ok(())
    });
    cases.tensors("affine_", &two, |t| {
        let (x, rest) = t.split_at_mut(1);
        outcome(affine_(&mut x[0], &rest[0], 0.5, 2.0))
    });
    cases.tensors("affine_noise_", &three, |t| {
        let (x, rest) = t.split_at_mut(1);
        outcome(affine_noise_(&mut x[0], &rest[0], &rest[1], 0.5, 2.0, 1.0))
    });
    cases.tensors("affine_four_", &[&x; 4], |t| {
        let (x, rest) = t.split_at_mut(1);
        outcome(affine_four_(&mut x[0], [&rest[0], &rest[1], &rest[2]], [0.5, 2.0, 1.0, -1.0]))
    });
    cases.tensors("affine_clamped_", &two, |t| {
        let (x, rest) = t.split_at_mut(1);
        outcome(affine_clamped_(&mut x[0], &rest[0], &numbers))
    });
    cases.numbers("affine", |a| outcome(affine(&x, &x, a, a)));
    cases.numbers("affine_clamped", |a| {
        outcome(affine_clamped(&x, &x, &Clamped { a, b: a, lo: a, hi: -a, c: a, d: a }))
    });
    let one = [&x];
    cases.tensors("channels_last", &one, |t| outcome(channels_last(&t[0])));
    cases.tensors("is_channels_last", &one, |t| {
        let _ = is_channels_last(&t[0]);
        Ok(())
    });
    cases.tensors("to_memory_format", &one, |t| {
        outcome(to_memory_format(&t[0], MemoryFormat::ChannelsLast))?;
        outcome(to_memory_format(&t[0], MemoryFormat::Contiguous))
    });
}

fn normalisation(cases: &mut Cases) {
    let (x, learned) = (images(), Tensor::ones([3], kind::FLOAT_CPU));
    let offset = Tensor::ones([2, 3], kind::FLOAT_CPU);
    let plain =
        GroupNorm { num_groups: 1, eps: 1e-5, weight: None, bias: None, offset: None, silu: true };
    cases.tensors("group_norm", &[&x, &learned, &learned, &offset], |t| {
        let (weight, bias, offset) = (Some(&t[1]), Some(&t[2]), Some(&t[3]));
        outcome(group_norm(&t[0], &GroupNorm { weight, bias, offset, ..plain }))
    });
    cases.integers("group_norm", |num_groups| {
        outcome(group_norm(&x, &GroupNorm { num_groups, ..plain }))
    });
    cases.numbers("group_norm", |eps| outcome(group_norm(&x, &GroupNorm { eps, ..plain })));
}

fn lists(cases: &mut Cases) {
    let x = images();
    cases.tensors("TensorList::new", &[&x], |t| outcome(TensorList::new([&t[0], &t[0]])));
    cases.tensors("TensorList::push", &[&x], |t| {
        let mut list = TensorList::new::<&Tensor>([]).map_err(|error| error.to_string())?;
        outcome(list.push(&t[0]))
    });
    let list = TensorList::new([&x]).expect("one tensor");
    cases.integers("TensorList::get", |i| outcome(list.get(i as usize)));
    let of = |t: &Tensor| TensorList::new([t]).map_err(|error| error.to_string());
    cases.tensors("foreach_lerp_", &[&x, &x], |t| {
        outcome(foreach_lerp_(&of(&t[0])?, &of(&t[1])?, 0.5))
    });
    cases.numbers("foreach_lerp_", |weight| {
        outcome(foreach_lerp_(&of(&images())?, &of(&x)?, weight))
    });
    cases.tensors("foreach_zero_", &[&x], |t| outcome(foreach_zero_(&of(&t[0])?)));
    let learned = images().set_requires_grad(true);
    learned.sum(Kind::Float).backward();
    cases.once("grads", "no gradient", || outcome(grads(&of(&x)?)));
    cases.once("grads", "a gradient", || outcome(grads(&of(&learned)?)));
    cases.tensors("drop_grads", &[&x], |t| outcome(drop_grads(&of(&t[0])?)));
    cases.tensors("grad_norm", &[&x], |t| outcome(grad_norm(&of(&t[0])?)));
    cases.tensors("clip_grad_norm_", &[&x], |t| outcome(clip_grad_norm_(&of(&t[0])?, 1.0)));
    cases.numbers("clip_grad_norm_", |most| outcome(clip_grad_norm_(&of(&images())?, most)));
    let step = Tensor::zeros([], kind::FLOAT_CPU);
    let one_step = step.view([1]);
    cases.tensors("fused_adamw_", &[&x, &x, &x, &x, &one_step], |t| {
        let [params, grads, avgs, squares, steps] = [0, 1, 2, 3, 4].map(|i| of(&t[i]));
        let settings = AdamW::default();
        outcome(fused_adamw_(&params?, &grads?, &avgs?, &squares?, &steps?, &settings))
    });
    cases.numbers("fused_adamw_", |number| {
        let [params, grads, avgs, squares] = [(); 4].map(|()| of(&images()));
        let settings = AdamW {
            lr: number,
            beta1: number,
            eps: number,
            weight_decay: number,
            ..AdamW::default()
        };
        outcome(fused_adamw_(
            &params?,
            &grads?,
            &avgs?,
            &squares?,
            &of(&one_step.copy())?,
            &settings,
        ))
    });
}

fn recomputation(cases: &mut Cases) {
    let x = images();
    cases.tensors("recomputed", &[&x, &x], |t| {
        let y = recomputed(&t[..1], {
            let held = t[1].shallow_clone();
            move |x| x[0].f_mul(&held)?.f_add(&x[0])
        });
        let y = y.map_err(|error| error.to_string())?;
        if y.requires_grad() {
            let sum = y.f_sum(Kind::Float).map_err(|error| error.to_string())?;
            outcome(sum.f_backward())?;
        }
        Ok(())
    });
    cases.once("recomputed", "no input", || {
        outcome(recomputed::<&Tensor>([], |_| Ok(Tensor::new())))
    });
    cases.once("recomputed", "a function that panics", || {
        outcome(recomputed([&x], |_| panic!("on purpose")))
    });
}

const KINDS: [Kind; 8] = [
    Kind::Float,
    Kind::Half,
    Kind::BFloat16,
    Kind::Int64,
    Kind::Bool,
    Kind::ComplexFloat,
    Kind::QInt8,
    Kind::Uint8,
];

const DEVICES: [Device; 5] =
    [Device::Cpu, Device::Cuda(0), Device::Cuda(usize::MAX), Device::Mps, Device::Vulkan];

const SHAPES: [&[i64]; 8] =
    [&[], &[0], &[3, 0], &[-1], &[2, -3], &[i64::MAX], &[1 << 40, 1 << 40], &[1; 70]];

fn generators(cases: &mut Cases) {
    for device in DEVICES {
        let what = format!("{device:?}");
        cases.once("Generator::new", &what, || outcome(Generator::new(device, u64::MAX)));
        cases.once("default_generator_state", &what, || outcome(default_generator_state(device)));
        cases.once("set_default_generator_state", &what, || {
            outcome(set_default_generator_state(device, &images()))
        });
        cases.once("Autocast::disabled", &what, || outcome(Autocast::disabled(device)));
        for kind in KINDS {
            cases.once("Autocast::new", &format!("{what}, {kind:?}"), || {
                outcome(Autocast::new(device, kind))
            });
        }
    }
    let generator = || Generator::new(Device::Cpu, 0).map_err(|error| error.to_string());
    let state = generator().and_then(|g| g.state().map_err(|e| e.to_string())).expect("a state");
    cases.tensors("Generator::set_state", &[&state], |t| outcome(generator()?.set_state(&t[0])));
    cases.tensors("set_default_generator_state", &[&state], |t| {
        outcome(set_default_generator_state(Device::Cpu, &t[0]))
    });
    cases.tensors("Generator::fill_normal", &[&images()], |t| {
        outcome(generator()?.fill_normal(&mut t[0]))
    });
    for shape in SHAPES {
        for kind in KINDS {
            let what = format!("{shape:?}, {kind:?}");
            cases.once("Generator::normal", &what, || outcome(generator()?.normal(shape, kind)));
            cases.once("Generator::uniform", &what, || outcome(generator()?.uniform(shape, kind)));
        }
        cases.once("Generator::randint", &format!("{shape:?}"), || {
            outcome(generator()?.randint(0, 5, shape))
        });
    }
    for low in ODD_WHOLES {
        cases.integers("Generator::randint", |high| outcome(generator()?.randint(low, high, [2])));
    }
    // A permutation of 2^31 and more is possible, and takes the memory that it takes.
    for n in [0, 1, -1, i64::MIN, i64::MAX, 1 << 60] {
        cases.once("Generator::randperm", &n.to_string(), || outcome(generator()?.randperm(n)));
    }
}

fn arguments(cases: &mut Cases) {
    let (x, times) = (images(), Tensor::from_slice(&[1_i64, 2]));
    cases.tensors("ensure_real", &[&x], |t| outcome(ensure_real("test", "x", &t[0])));
    cases.tensors("ensure_dense", &[&x], |t| outcome(ensure_dense("test", "x", &t[0])));
    cases.once("ensure_shape", "false", || {
        outcome(ensure_shape("test", "x", &x, false, || "[batch]".to_owned()))
    });
    cases.once("ensure_kind", "false", || outcome(ensure_kind("test", "x", &x, false, "Int64")));
    cases.once("ArgumentError::value", "", || {
        outcome(Err::<(), _>(ArgumentError::value("test", "x", f64::NAN, "")))
    });
    cases.tensors("ensure_same_shape", &[&x, &x], |t| {
        outcome(ensure_same_shape("test", ("left", &t[0]), ("right", &t[1])))
    });
    cases.tensors("ensure_timesteps", &[&times, &x], |t| {
        outcome(ensure_timesteps("test", "timesteps", &t[0], &t[1]))
    });
}

fn files(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bytes");
    std::fs::write(&path, [1_u8; 64]).expect("there is room");
    let empty = folder.path().join("empty");
    std::fs::write(&empty, []).expect("there is room");
    let places = [&path, &empty, &folder.path().to_owned(), &folder.path().join("none")];
    for place in places.into_iter().chain([&"/dev/zero".into(), &"nul\0byte".into()]) {
        let what = place.display().to_string();
        cases.once("MappedFile::open", &what, || outcome(MappedFile::open(place)));
        cases.once("ensure_script_archive", &what, || outcome(ensure_script_archive(place)));
    }
    let jpeg = std::fs::read(repository().join("tests/golden/pictures/grey.jpg")).expect("a file");
    for cut in 0..jpeg.len() {
        cases.once("decode_jpeg", &format!("{cut} bytes"), || {
            outcome(decode_jpeg(&jpeg[..cut], 999))
        });
    }
    for most in [0, 1, 383, 384, usize::MAX] {
        let fits = decode_jpeg(&jpeg, most).is_ok();
        assert_eq!(fits, most >= 384, "{most}");
    }
    let file = MappedFile::open(&path).expect("it is there");
    for shape in SHAPES {
        for kind in KINDS {
            for offset in [0, 1, 63, 64, 65, usize::MAX] {
                let what = format!("{shape:?}, {kind:?} at {offset}");
                cases.once("MappedFile::tensor", &what, || {
                    outcome(file.tensor(offset, shape, kind))
                });
            }
        }
    }
}

fn row_files(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rows");
    let file = RowFile::create(&path, b"head", 96, 3).expect("there is room");
    let places = [&path, &folder.path().to_owned(), &folder.path().join("none/rows")];
    for place in places.into_iter().chain([&"/dev/zero".into(), &"nul\0byte".into()]) {
        let what = place.display().to_string();
        cases.once("RowFile::create", &what, || outcome(RowFile::create(place, b"head", 96, 3)));
        cases.once("RowFile::open", &what, || outcome(RowFile::open(place, 4, 96, 3)));
    }
    // Sizes that no disk has, and invalid ones; sizes that a disk could have are not requested.
    for (row_bytes, num_rows) in [(0, 0), (0, 3), (1, usize::MAX), (usize::MAX, 1), (96, 1 << 60)] {
        let what = format!("{num_rows} rows of {row_bytes}");
        let other = folder.path().join("other");
        cases.once("RowFile::create", &what, || {
            outcome(RowFile::create(&other, b"head", row_bytes, num_rows))
        });
        cases
            .once("RowFile::open", &what, || outcome(RowFile::open(&path, 4, row_bytes, num_rows)));
        cases.once("RowFile::open", &what, || {
            outcome(RowFile::open(&path, usize::MAX, row_bytes, num_rows))
        });
        assert!(!other.exists());
    }
    let mut other = RowFile::create(folder.path().join("written"), b"", 8, 3).expect("as above");
    for first in [0, 2, 3, usize::MAX] {
        for len in [0, 7, 8, 24, 32] {
            cases.once("RowFile::write", &format!("{len} bytes from row {first} on"), || {
                outcome(other.write(first, &vec![1; len]))
            });
        }
    }
    let three = Tensor::ones([3, 4, 2], kind::FLOAT_CPU);
    cases
        .tensors("gather_rows", &[&three], |t| outcome(gather_rows(&mut t[0], 0, [(&file, 2, 0)])));
    for odd in [0, 3, 64, 65, 96, usize::MAX] {
        let what = odd.to_string();
        let gathered =
            |offset, row, to| outcome(gather_rows(&mut three.copy(), offset, [(&file, row, to)]));
        cases.once("gather_rows", &format!("offset {what}"), || gathered(odd, 0, 0));
        cases.once("gather_rows", &format!("from row {what}"), || gathered(0, odd, 0));
        cases.once("gather_rows", &format!("to row {what}"), || gathered(0, 0, odd));
        cases.once("copy_rows_", &what, || {
            outcome(copy_rows_(&mut three.copy(), &[0, odd, 1], &three))
        });
    }
    cases.tensors("copy_rows_", &[&three, &three], |t| {
        let (out, from) = t.split_at_mut(1);
        outcome(copy_rows_(&mut out[0], &[2, 0, 0], &from[0]))
    });
}

fn the_process(cases: &mut Cases) {
    let before = ddil_libtorch::num_threads().expect("libtorch knows");
    for n in [0, usize::MAX] {
        cases.once("set_num_threads", &n.to_string(), || outcome(set_num_threads(n)));
        cases.once("set_num_interop_threads", &n.to_string(), || {
            outcome(set_num_interop_threads(n))
        });
    }
    set_num_threads(before).expect("it was so");
    cases.once("deterministic", "off", || outcome(deterministic(false)));
}
