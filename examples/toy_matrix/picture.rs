//! Plots of the first seed's samples: one row per setting, one column per kind.

use std::path::Path;

use ddil_examples::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use crate::cell::{Arm, Cell, Method, Setting};
use crate::measure::{Points, points_name};
use crate::store::Store;

const PANEL_SIZE: u32 = 300;
/// Five colours of Okabe and Ito, which most eyes can tell apart.
const CLASS_COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
];

/// A caption, and samples if there are any.
type Panel = (String, Option<Points>);

/// Draws `samples-<method>.png`, and the same for the thresholded cells, from the available samples.
pub(crate) fn draw(folder: &Path, store: &Store, method: Method) -> Result<()> {
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the font cannot be read")?;
    for thresholded in [false, true] {
        let rows = rows(store, method, thresholded)?;
        if rows.is_empty() {
            continue;
        }
        let on = if thresholded { "-thresholded" } else { "" };
        let path = folder.join(format!("samples-{}{on}.png", method.name()));
        let (columns, lines) = (Arm::ALL.len() + 1, rows.len());
        let size = (PANEL_SIZE * columns as u32, PANEL_SIZE * lines as u32);
        let root = BitMapBackend::new(&path, size).into_drawing_area();
        root.fill(&WHITE)?;
        let areas = root.split_evenly((lines, columns));
        let panels = rows.iter().flatten();
        for (area, (caption, points)) in areas.iter().zip(panels) {
            if let Some(points) = points {
                panel(area, caption, points)?;
            }
        }
        root.present()?;
    }
    Ok(())
}

/// For each setting that has been run: the reference and all arms, with captions.
fn rows(store: &Store, method: Method, thresholded: bool) -> Result<Vec<Vec<Panel>>> {
    let mut rows = Vec::new();
    for setting in Setting::ALL {
        let cell = |arm| Cell { setting, method, thresholded, seed: 0, arm };
        let reference = store.points(&points_name(cell(Arm::Forward), true))?;
        let mut row = vec![(format!("{}, reference", setting.name()), reference)];
        for arm in Arm::ALL {
            let points = store.points(&points_name(cell(arm), false))?;
            row.push((format!("{} on {}", method.title(), arm.name()), points));
        }
        if row.iter().skip(1).any(|(_, points)| points.is_some()) {
            rows.push(row);
        }
    }
    Ok(rows)
}

fn panel(
    area: &DrawingArea<BitMapBackend<'_>, Shift>,
    caption: &str,
    points: &Points,
) -> Result<()> {
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 17))
        .margin(6)
        .build_cartesian_2d(-1.7..1.7, -1.7..1.7)?;
    chart.configure_mesh().disable_mesh().disable_axes().draw()?;
    chart.draw_series(points.iter().map(|&(x, y, class)| {
        let color = CLASS_COLORS[class as usize % CLASS_COLORS.len()];
        Circle::new((x, y), 1, color.mix(0.7).filled())
    }))?;
    Ok(())
}
