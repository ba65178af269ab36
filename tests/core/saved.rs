use std::fs;

use ddil_core::{
    AggregationBuffer, BufferConfig, Conditioning, Error, SavedState, Source, SpillConfig, States,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Kind, Tensor, kind};

use crate::common::trailing;

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// 60 states a ring, most of them on disk.
fn buffer(folder: &std::path::Path) -> ddil_core::Result<AggregationBuffer> {
    let spill = SpillConfig { folder: folder.to_owned(), byte_budget: 1 << 20 };
    let (capacity, byte_budget) = (180, 600);
    let config =
        BufferConfig { capacity, byte_budget, spill: Some(spill), ..BufferConfig::default() };
    AggregationBuffer::new(config, &trailing(4))
}

fn filled(folder: &std::path::Path) -> ddil_core::Result<AggregationBuffer> {
    let mut buffer = buffer(folder)?;
    for step in 0..50 {
        buffer.insert(&States {
            x_t: Tensor::arange(15, kind::FLOAT_CPU).view([3, 5]) + step as i64,
            timesteps: Tensor::from_slice(&[749_i64, 499, 249]),
            grid_indices: vec![1, 2, 3],
            conditioning: Conditioning::none()
                .with("audio", Tensor::full([3, 2], step as i64, (Kind::Half, tch::Device::Cpu))),
            sources: vec![Source::Student; 3],
            created_at_step: vec![step; 3],
        })?;
    }
    Ok(buffer)
}

/// Tensors, metadata and spilled files come back, with a part of conditioning that has a name of its own.
#[test]
fn a_folder_holds_a_state() -> TestResult {
    let place = tempfile::tempdir()?;
    let mut original = filled(&place.path().join("spill"))?;
    assert!(original.statistics(50).spilled_bytes > 0);
    let folder = place.path().join("saved");
    original.save()?.write(&folder)?;

    let mut restored = buffer(&place.path().join("other"))?;
    restored.restore(&SavedState::read(&folder)?)?;
    let draw = |buffer: &mut AggregationBuffer| {
        buffer.sample(&[1, 2, 3, 3, 2, 1], 50, &mut StdRng::seed_from_u64(3))
    };
    let (a, b) = (draw(&mut original)?, draw(&mut restored)?);
    assert_eq!(a.x_t, b.x_t);
    assert_eq!(a.conditioning.get("audio"), b.conditioning.get("audio"));
    assert!(a.conditioning.get("audio").is_some());
    assert_eq!((a.sources, a.created_at_step), (b.sources, b.created_at_step));
    Ok(())
}

#[test]
fn what_is_not_whole_is_refused() -> TestResult {
    let place = tempfile::tempdir()?;
    let folder = place.path().join("saved");
    let buffer = filled(&place.path().join("spill"))?;
    let saved = buffer.save()?;
    saved.write(&folder)?;
    // Nothing is overwritten.
    assert!(matches!(saved.write(&folder), Err(Error::Io { action: "create", .. })));

    let (state, tensors) = (folder.join("state.json"), folder.join("state.safetensors"));
    let sound = fs::read_to_string(&state)?;
    let name = &saved.files[0].name;
    let damages = [
        sound.replace("\"format_version\": 1", "\"format_version\": 2"),
        sound.replace(name, "../elsewhere"),
        sound[..sound.len() / 2].to_owned(),
    ];
    for damaged in damages {
        assert_ne!(damaged, sound);
        fs::write(&state, &damaged)?;
        assert!(SavedState::read(&folder).is_err(), "{damaged}");
    }
    fs::write(&state, &sound)?;
    assert!(SavedState::read(&folder).is_ok());
    let whole = fs::read(&tensors)?;
    fs::write(&tensors, &whole[..whole.len() - 1])?;
    assert!(matches!(SavedState::read(&folder), Err(Error::Torch { .. })));
    fs::remove_file(&state)?;
    assert!(matches!(SavedState::read(&folder), Err(Error::Files(_))));
    Ok(())
}
