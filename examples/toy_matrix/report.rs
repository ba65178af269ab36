//! The results of the cells, as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use ddil_examples::{Result, mean_and_error};

use crate::cell::{Arm, Cell, Method, Modes, Record, Setting};
use crate::measure::TEACHER_STEPS;
use crate::options::Options;
use crate::picture;
use crate::store::Store;

/// The finished cells with the current budgets, each once.
struct Cells(BTreeMap<Cell, Record>);

impl Cells {
    fn new(options: &Options, store: &Store) -> Result<Self> {
        let mut cells = BTreeMap::new();
        for record in store.records() {
            if record.hash == options.budget(record.cell.method).hash()? {
                cells.insert(record.cell, record);
            }
        }
        Ok(Self(cells))
    }

    fn of(&self, setting: Setting, method: Method, thresholded: bool) -> Self {
        let keep = |cell: &Cell| {
            (cell.setting, cell.method, cell.thresholded) == (setting, method, thresholded)
        };
        let kept = self.0.iter().filter(|(cell, _)| keep(cell));
        Self(kept.map(|(cell, record)| (*cell, record.clone())).collect())
    }

    /// The cells of an arm, by seed.
    fn arm(&self, arm: Arm) -> Vec<&Record> {
        self.0.values().filter(|record| record.cell.arm == arm).collect()
    }

    /// For the seeds that both have finished: an arm's distances in 4 steps, and another's.
    fn pairs(&self, arm: Arm, other: Arm) -> Vec<(f64, f64)> {
        let others = self.arm(other);
        let of_seed = |seed| others.iter().find(|r| r.cell.seed == seed)?.distances[2];
        let pair = |record: &Record| Some((record.distances[2]?, of_seed(record.cell.seed)?));
        self.arm(arm).into_iter().filter_map(pair).collect()
    }
}

/// Writes `table.md` and the plots.
pub(crate) fn write(options: &Options, store: &Store) -> Result<()> {
    let cells = Cells::new(options, store)?;
    let mut text = String::new();
    summary(&mut text, &cells)?;
    for thresholded in [false, true] {
        for setting in Setting::ALL {
            for method in Method::ALL {
                let group = cells.of(setting, method, thresholded);
                if !group.0.is_empty() {
                    table(&mut text, &group, setting, method, thresholded)?;
                }
            }
        }
    }
    costs(&mut text, &cells)?;
    fs::write(options.out.join("table.md"), &text)?;
    println!("{text}{} cells", cells.0.len());
    for method in Method::ALL {
        picture::draw(&options.out, store, method)?;
    }
    Ok(())
}

/// One line for each setting, method and threshold.
fn summary(text: &mut String, cells: &Cells) -> Result<()> {
    writeln!(
        text,
        "### Energy distance in 4 steps, over that of `forward` for the same seed: mean [least .. most]\n"
    )?;
    writeln!(
        text,
        "| method | setting | thresholded | n | `forward`, × 1000 | `mix` | `student` | `teacher` | `mix` / `student` | KL of `forward`, `mix`, `student` |"
    )?;
    writeln!(text, "| - | - | - | - | - | - | - | - | - | - |")?;
    for method in Method::ALL {
        for setting in Setting::ALL {
            for thresholded in [false, true] {
                let group = cells.of(setting, method, thresholded);
                let forward = group.arm(Arm::Forward);
                if forward.is_empty() {
                    continue;
                }
                let distances: Vec<f64> = forward.iter().filter_map(|r| r.distances[2]).collect();
                let ratios = [
                    ratios(&group, Arm::Mix, Arm::Forward),
                    ratios(&group, Arm::Student, Arm::Forward),
                    ratios(&group, Arm::Teacher, Arm::Forward),
                    ratios(&group, Arm::Mix, Arm::Student),
                ];
                let kl = [Arm::Forward, Arm::Mix, Arm::Student].map(|arm| {
                    let kls: Vec<f64> =
                        group.arm(arm).iter().filter_map(|r| r.modes).map(|m| m.kl).collect();
                    if kls.is_empty() {
                        return "-".to_owned();
                    }
                    format!("{:.4}", mean_and_error(&kls).0)
                });
                writeln!(
                    text,
                    "| {} | {} | {} | {} | {} | {} | {} |",
                    method.title(),
                    setting.title(),
                    if thresholded { "yes" } else { "no" },
                    forward.len(),
                    thousandths(&distances),
                    ratios.join(" | "),
                    kl.join(", "),
                )?;
            }
        }
    }
    Ok(writeln!(text)?)
}

/// Ratios to another arm with the same seeds.
fn ratios(cells: &Cells, arm: Arm, other: Arm) -> String {
    let pairs = cells.pairs(arm, other);
    let ratios: Vec<f64> = pairs.iter().map(|(arm, other)| arm / other).collect();
    if ratios.is_empty() {
        return "-".to_owned();
    }
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.2} [{least:.2} .. {most:.2}]", mean_and_error(&ratios).0)
}

fn table(
    text: &mut String,
    cells: &Cells,
    setting: Setting,
    method: Method,
    thresholded: bool,
) -> Result<()> {
    let on = if thresholded { ", thresholded" } else { "" };
    writeln!(text, "### {}: {}{on}\n", method.title(), setting.title())?;
    let has_missing = !setting.missing().is_empty();
    let missing = |column: &str| if has_missing { column.to_owned() } else { String::new() };
    writeln!(
        text,
        "| states | n | 1 step | 2 steps | 4 steps | / forward, by seed | minus forward | KL | off, % | coverage |{} shift | diverged |",
        missing(" missing |")
    )?;
    writeln!(text, "| - | - | - | - | - | - | - | - | - | - |{} - | - |", missing(" - |"))?;
    for arm in Arm::ALL {
        let records = cells.arm(arm);
        if records.is_empty() {
            continue;
        }
        let modes = columns_of_modes(
            &records.iter().filter_map(|r| r.modes).collect::<Vec<_>>(),
            has_missing,
        );
        let diverged = records.iter().filter(|r| r.diverged).count();
        let steps = [0, 1, 2].map(|i| {
            thousandths(&records.iter().filter_map(|r| r.distances[i]).collect::<Vec<_>>())
        });
        writeln!(
            text,
            "| {} | {} | {} | {} | {modes} | {} | {diverged} of {} |",
            arm.name(),
            records.len(),
            steps.join(" | "),
            against_forward(cells, arm),
            shift(&records),
            records.len(),
        )?;
    }
    let forward = cells.0.values().filter(|r| r.cell.arm == Arm::ALL[0]).collect::<Vec<_>>();
    for (i, steps) in TEACHER_STEPS.into_iter().enumerate() {
        let distances: Vec<f64> = forward.iter().map(|r| r.teacher_distances[i]).collect();
        writeln!(
            text,
            "| the teacher, {steps} steps | {} | | | {} | | | | | |{} | |",
            forward.len(),
            thousandths(&distances),
            missing(" |")
        )?;
    }
    let modes: Vec<Modes> = forward.iter().map(|r| r.teacher_modes).collect();
    let modes = columns_of_modes(&modes, has_missing);
    writeln!(text, "| the reference | {} | | | 0 | | | {modes} | | |\n", forward.len())?;
    Ok(())
}

/// Mean and standard error, times 1000; empty without values.
fn thousandths(values: &[f64]) -> String {
    if values.is_empty() {
        return "-".to_owned();
    }
    let (mean, error) = mean_and_error(values);
    let digits = if mean < 0.1 { 2 } else { 0 };
    if values.len() == 1 {
        return format!("{:.digits$}", mean * 1e3);
    }
    format!("{:.digits$} ± {:.digits$}", mean * 1e3, error * 1e3)
}

/// Ratios to `forward` with the same seeds, and differences, times 1000.
fn against_forward(cells: &Cells, arm: Arm) -> String {
    let pairs = cells.pairs(arm, Arm::Forward);
    if arm == Arm::Forward || pairs.is_empty() {
        return " | ".to_owned();
    }
    let differences: Vec<f64> = pairs.iter().map(|(arm, forward)| arm - forward).collect();
    format!("{} | {}", ratios(cells, arm, Arm::Forward), thousandths(&differences))
}

fn columns_of_modes(modes: &[Modes], has_missing: bool) -> String {
    if modes.is_empty() {
        return if has_missing { "- | - | - | -" } else { "- | - | -" }.to_owned();
    }
    let mean = |of: fn(&Modes) -> f64| modes.iter().map(of).sum::<f64>() / modes.len() as f64;
    let missing =
        if has_missing { format!(" | {:.2}", mean(|m| m.missing)) } else { String::new() };
    format!(
        "{:.4} | {:.1} | {:.2}{missing}",
        mean(|m| m.kl),
        1e2 * mean(|m| m.off),
        mean(|m| m.coverage)
    )
}

/// Means by timestep, times 1000.
fn shift(records: &[&Record]) -> String {
    let shifts: Vec<&Vec<f64>> =
        records.iter().map(|r| &r.shift).filter(|s| !s.is_empty()).collect();
    let Some(first) = shifts.first() else { return "-".to_owned() };
    let mean = |i: usize| shifts.iter().map(|s| 1e3 * s[i]).sum::<f64>() / shifts.len() as f64;
    // Adding 0 turns the negative zero that results from rounding small means into a positive one.
    let means: Vec<String> =
        (0..first.len()).map(|i| format!("{:.0}", mean(i).round() + 0.0)).collect();
    means.join(" / ")
}

/// The cost of an update, over all settings.
fn costs(text: &mut String, cells: &Cells) -> Result<()> {
    writeln!(text, "### What an update of the student costs\n")?;
    writeln!(
        text,
        "| method | states | student | teacher | critic | ms |\n| - | - | - | - | - | - |"
    )?;
    for method in Method::ALL {
        for arm in Arm::ALL {
            let of = |r: &&Record| {
                r.cell.method == method && r.cell.arm == arm && r.cell.setting == Setting::Guided3
            };
            let records: Vec<&Record> = cells.0.values().filter(of).collect();
            if records.is_empty() {
                continue;
            }
            let mean = |of: &dyn Fn(&Record) -> f64| {
                records.iter().map(|r| of(r)).sum::<f64>() / records.len() as f64
            };
            let evaluations = [0, 1, 2].map(|i| format!("{:.2}", mean(&|r| r.evaluations[i])));
            writeln!(
                text,
                "| {} | {} | {} | {:.1} |",
                method.title(),
                arm.name(),
                evaluations.join(" | "),
                1e3 * mean(&|r| r.seconds_per_update)
            )?;
        }
    }
    writeln!(text)?;
    Ok(())
}
