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
    let spill = SpillConfig::new(folder, 1 << 20);
    let (capacity, byte_budget) = (180, 600);
    let config = BufferConfig::default().with(|config| {
        config.capacity = capacity;
        config.byte_budget = byte_budget;
        config.spill = Some(spill);
    });
    AggregationBuffer::new(config, &trailing(4))
}

fn filled(folder: &std::path::Path) -> ddil_core::Result<AggregationBuffer> {
    let (mut buffer, grid) = (buffer(folder)?, trailing(4));
    for step in 0..50 {
        let x_t = Tensor::arange(15, kind::FLOAT_CPU).view([3, 5]) + step as i64;
        let audio = Tensor::full([3, 2], step as i64, (Kind::Half, tch::Device::Cpu));
        let states = States::new(x_t, &grid, vec![1, 2, 3], Source::Student)?
            .with_conditioning(Conditioning::none().with("audio", audio))
            .made_at(step);
        buffer.insert(&states)?;
    }
    Ok(buffer)
}

/// Tensors, metadata and spilled files come back, including a custom part of the conditioning.
#[test]
fn a_folder_holds_a_state() -> TestResult {
    let place = tempfile::tempdir()?;
    let mut original = filled(&place.path().join("spill"))?;
    assert!(original.statistics(50).spilled_bytes > 0);
    let folder = place.path().join("saved");
    original.save()?.write(&folder)?;

    let mut restored = buffer(&place.path().join("other"))?;
    restored.restore(&SavedState::from_folder(&folder)?)?;
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
fn incomplete_files_are_refused() -> TestResult {
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
        assert!(SavedState::from_folder(&folder).is_err(), "{damaged}");
    }
    fs::write(&state, &sound)?;
    assert!(SavedState::from_folder(&folder).is_ok());
    let whole = fs::read(&tensors)?;
    fs::write(&tensors, &whole[..whole.len() - 1])?;
    assert!(matches!(SavedState::from_folder(&folder), Err(Error::Torch { .. })));
    fs::remove_file(&state)?;
    assert!(matches!(SavedState::from_folder(&folder), Err(Error::Files(_))));
    Ok(())
}
