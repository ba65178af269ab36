use ddil_schedulers::{PreviousTimestep, TimestepSpacing, Timesteps};
use proptest::prelude::*;

use crate::support::recorded_values;

const SPACINGS: [TimestepSpacing; 3] =
    [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing];

fn spaced(spacing: TimestepSpacing, n: u32, offset: u32) -> Timesteps {
    Timesteps::spaced(spacing, 1000, n, offset).expect("n is in 1..=1000")
}

#[test]
fn grids_are_the_published_ones() {
    let golden: [(TimestepSpacing, u32, u32, &[i64]); 7] = [
        (TimestepSpacing::Leading, 4, 0, &[750, 500, 250, 0]),
        (TimestepSpacing::Leading, 4, 1, &[751, 501, 251, 1]),
        (TimestepSpacing::Linspace, 4, 0, &[999, 666, 333, 0]),
        (TimestepSpacing::Trailing, 4, 0, &[999, 749, 499, 249]),
        (TimestepSpacing::Linspace, 7, 0, &[999, 832, 666, 500, 333, 166, 0]),
        (TimestepSpacing::Trailing, 7, 0, &[999, 856, 713, 570, 428, 285, 142]),
        (TimestepSpacing::Trailing, 1, 0, &[999]),
    ];
    for (spacing, n, offset, expected) in golden {
        assert_eq!(spaced(spacing, n, offset).as_slice(), expected);
    }
    assert_eq!(spaced(TimestepSpacing::Leading, 50, 1).as_slice()[0], 981);
}

#[test]
fn lcm_grids_are_the_published_ones() {
    let golden: [&[i64]; 6] = [
        &[999],
        &[999, 499],
        &[999, 679, 339],
        &[999, 759, 499, 259],
        &[999, 839, 679, 499, 339, 179],
        &[999, 879, 759, 639, 499, 379, 259, 139],
    ];
    for expected in golden {
        let grid = Timesteps::lcm(1000, 50, expected.len() as u32).expect("it fits");
        assert_eq!(grid.as_slice(), expected);
    }
}

/// Length, sum and weighted sum, as the recording script takes them.
fn sums(list: &[i64]) -> [f64; 3] {
    let weighted: i64 = (1..).zip(list).map(|(i, t)| i * t).sum();
    [list.len() as f64, list.iter().sum::<i64>() as f64, weighted as f64]
}

/// Every list of diffusers, for every number of steps; this project's own where diffusers rounds differently.
#[test]
fn lists_of_diffusers_are_reproduced_for_every_n() {
    let recorded = recorded_values("tables.safetensors", "ddim_grids");
    let mut expected = recorded.chunks(3);
    let mut different = Vec::new();
    for spacing in SPACINGS {
        for n in 1..=1000 {
            let expected = expected.next().expect("1000 lists a spacing were recorded");
            let theirs = Timesteps::diffusers(spacing, 1000, n, 0).expect("n is in 1..=1000");
            assert_eq!(sums(theirs.as_slice()), expected, "{spacing:?} {n}");
            if spaced(spacing, n, 0).as_slice() != theirs.as_slice() {
                different.push((spacing, n));
            }
        }
    }
    let of = |spacing| {
        let of = different.iter().filter(move |(found, _)| *found == spacing).map(|(_, n)| *n);
        of.collect::<Vec<u32>>()
    };
    assert!(of(TimestepSpacing::Leading).is_empty());
    assert_eq!(of(TimestepSpacing::Linspace)[..2], [1, 27]);
    let trailing = of(TimestepSpacing::Trailing);
    assert_eq!((trailing.len(), trailing[0]), (50, 48));
}

#[test]
fn lcm_lists_of_diffusers_are_reproduced_for_every_n() {
    let recorded = recorded_values("tables.safetensors", "lcm_grids");
    for (n, expected) in (1..=50).zip(recorded.chunks(3)) {
        let grid = Timesteps::lcm(1000, 50, n).expect("n is in 1..=50");
        assert_eq!(sums(grid.as_slice()), expected, "{n}");
    }
}

#[test]
fn every_grid_falls_and_steps_to_its_own_next_entry() {
    for (spacing, n) in SPACINGS.into_iter().flat_map(|s| (1..=1000).map(move |n| (s, n))) {
        let grid = spaced(spacing, n, 0);
        let list = grid.as_slice();
        assert_eq!(list.len(), n as usize);
        assert!(list.windows(2).all(|pair| pair[0] > pair[1]), "{spacing:?} {n}");
        assert!(list.iter().all(|t| (0..1000).contains(t)));
        let next = list.iter().skip(1).copied().chain([-1]);
        assert!(grid.pairs().eq(list.iter().copied().zip(next)));
    }
}

#[test]
fn trailing_grids_of_twice_the_steps_hold_the_coarser_one() {
    for n in 1..=500 {
        let (coarse, fine) =
            (spaced(TimestepSpacing::Trailing, n, 0), spaced(TimestepSpacing::Trailing, 2 * n, 0));
        assert!(coarse.as_slice().iter().eq(fine.as_slice().iter().step_by(2)), "{n}");
        assert_eq!(coarse.refined(2, 1000).expect("it fits"), fine);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_refined_grid_keeps_its_timesteps(n in 1_u32..60, parts in 1_u32..9, spacing in 0_usize..3) {
        let grid = spaced(SPACINGS[spacing], n, 8);
        if let Ok(fine) = grid.refined(parts, 1000) {
            prop_assert!(grid.as_slice().iter().eq(fine.as_slice().iter().step_by(parts as usize)));
            prop_assert_eq!(fine.len(), grid.len() * parts as usize);
        } else {
            let intervals = grid.as_slice().iter().copied().chain([-1]).collect::<Vec<_>>();
            let least = intervals.windows(2).map(|pair| pair[0] - pair[1]).min();
            prop_assert!(least.is_some_and(|least| least < i64::from(parts)));
        }
    }

    #[test]
    fn explicit_lists_are_taken_as_they_are(mut list in prop::collection::btree_set(0_i64..1000, 1..20)) {
        let mut falling: Vec<i64> = std::mem::take(&mut list).into_iter().collect();
        falling.reverse();
        let grid = Timesteps::explicit(falling.clone(), 1000).expect("it falls");
        prop_assert_eq!(grid.as_slice(), falling.as_slice());
        falling.reverse();
        prop_assert_eq!(Timesteps::explicit(falling.clone(), 1000).is_ok(), falling.len() == 1);
    }
}

#[test]
fn the_stride_rule_leaves_the_grid_where_it_is_known_to() {
    let rule = |spacing, n| {
        let grid = spaced(spacing, n, 0).with_previous(PreviousTimestep::Stride, 1000);
        grid.pairs().map(|(_, prev)| prev).collect::<Vec<_>>()
    };
    assert_eq!(rule(TimestepSpacing::Trailing, 4), [749, 499, 249, -1]);
    assert_eq!(rule(TimestepSpacing::Linspace, 4), [749, 416, 83, -1]);
    assert_eq!(rule(TimestepSpacing::Trailing, 7)[..2], [857, 714]);
    let back = spaced(TimestepSpacing::Linspace, 4, 0)
        .with_previous(PreviousTimestep::Stride, 1000)
        .with_previous(PreviousTimestep::NextInGrid, 1000);
    assert_eq!(back, spaced(TimestepSpacing::Linspace, 4, 0));
}

#[test]
fn invalid_lists_are_refused_by_name() {
    for n in [0, 1001] {
        for spacing in SPACINGS {
            let message =
                Timesteps::spaced(spacing, 1000, n, 0).expect_err("no such n").to_string();
            assert!(message.contains(&format!("`num_inference_steps` is {n}")), "{message}");
        }
    }
    // The offset pushes the first of 1000 leading timesteps off the grid.
    assert!(Timesteps::spaced(TimestepSpacing::Leading, 1000, 1000, 1).is_err());
    for list in [vec![], vec![5, 5], vec![4, 5], vec![1000], vec![3, -1]] {
        let message = Timesteps::explicit(list, 1000).expect_err("it cannot be").to_string();
        assert!(message.contains("strictly falling"), "{message}");
    }
    assert!(Timesteps::lcm(1000, 50, 51).is_err() && Timesteps::lcm(1000, 1001, 4).is_err());
    assert!(Timesteps::lcm(1000, 0, 1).is_err());
    let grid = spaced(TimestepSpacing::Trailing, 4, 0);
    for parts in [0, 251, u32::MAX] {
        let message = grid.refined(parts, 1000).expect_err("it does not fit").to_string();
        assert!(message.contains(&format!("`substeps` is {parts}")), "{message}");
    }
}
