//! Renders a report as tables and images.

use std::fmt::Write as _;

use ddil_files::{write_atomic, write_json};
use ddil_pipelines::{Image, layout};
use tch::Tensor;

use super::folder::ComparisonFolder;
use super::metric::Metric;
use super::record::MIN_COVERAGE;
use super::report::ComparisonReport;
use super::{plot, table};
use crate::error::{Error, Result};
use crate::sample_file::KEPT;

impl ComparisonReport {
    /// Tables for a terminal, without the metrics for which it has no room.
    pub fn text(&self) -> String {
        let (shown, left_out): (Vec<Metric>, Vec<Metric>) =
            self.metrics().into_iter().partition(|metric| metric.is_on_terminal());
        let aligned = |title: &str, cells: &[Vec<String>]| {
            format!("\n{title}\n\n{}", crate::results::aligned(cells))
        };
        let left_out: Vec<&str> = left_out.into_iter().map(Metric::as_str).collect();
        let note = format!("\nAlso in table.md: {}.\n", left_out.join(", "));
        self.written(&shown, &aligned) + if left_out.is_empty() { "" } else { &note }
    }

    /// The tables in Markdown, with all metrics.
    pub fn markdown(&self) -> String {
        self.written(&self.metrics(), &|title, cells| {
            format!("\n### {title}\n\n{}", table::markdown(cells))
        })
    }

    fn written(
        &self,
        metrics: &[Metric],
        table_of: &dyn Fn(&str, &[Vec<String>]) -> String,
    ) -> String {
        let mut text = table_of(&self.name, &table::summary(self, metrics));
        let _ = writeln!(
            text,
            "\nMean ± standard error over seeds. `*`: the students were not trained for this number of steps. `frechet` is the\n\
             distance to the data, `to teacher` to the teacher's samples at its full number of steps. Cells with coverage below\n\
             {MIN_COVERAGE}, or with NaN or infinite samples, have collapsed; cells that diverged or failed are in no mean."
        );
        if metrics.iter().any(|metric| Metric::OF_CLASSES.contains(metric)) {
            text += "`missing` is the distance to the teacher of the classes that the data lack, `agreement` the share of samples that \
                     the\nclassifier assigns to their class.\n";
        }
        let differences = table::differences(self, metrics);
        if differences.len() > 1 {
            text += &table_of("Paired differences to the baseline", &differences);
            let _ = writeln!(
                text,
                "\nValue minus baseline, mean over cells with equal seed and equal values elsewhere, ± standard error; in\n\
                 brackets, the difference in standard errors."
            );
        }
        let shifts = self.shifts();
        if !shifts.is_empty() {
            text += &table_of("Shift", &table::shift(&shifts));
            text += "\nEnergy distance between the states visited at inference and noised data, per timestep; `chance`: \
                     between two\nhalves of noised data.\n";
        }
        if !self.image_rows.is_empty() {
            let names: Vec<&str> = self.image_rows.iter().map(|(name, _)| name.as_str()).collect();
            let _ = writeln!(text, "\nRows of side_by_side.png: {}.", names.join("; "));
        }
        text
    }

    /// The files that [`write`](Self::write) writes.
    pub(crate) fn files(&self) -> Vec<&'static str> {
        let mut files = vec!["results.json", "table.md", "quality.svg", "shift.svg"];
        if !self.image_rows.is_empty() {
            files.push("side_by_side.png");
        }
        files
    }

    /// Writes `results.json`, `table.md` and the images; each file is complete or absent.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(crate) fn write(&self, folder: &ComparisonFolder) -> Result<()> {
        write_json(&folder.file("results.json"), &self.entries)?;
        write_atomic(&folder.file("table.md"), self.markdown().as_bytes())?;
        plot::write(&folder.file("quality.svg"), plot::quality(self))?;
        plot::write(&folder.file("shift.svg"), plot::shift(&self.shifts()))?;
        if let Some(grid) = self.side_by_side()? {
            grid.save(&folder.file("side_by_side.png"))?;
        }
        Ok(())
    }

    /// One row of samples for each teacher and each arm, from the same noise in each column.
    fn side_by_side(&self) -> Result<Option<Image>> {
        let rows: Vec<&Tensor> = self.image_rows.iter().map(|(_, images)| images).collect();
        let Some(columns) = rows.iter().map(|images| images.size()[0]).min() else {
            return Ok(None);
        };
        let rows: Vec<Tensor> = rows.iter().map(|images| images.narrow(0, 0, columns)).collect();
        let images = Tensor::f_cat(&rows, 0).map_err(Error::torch("side_by_side"))?;
        Ok(Some(Image::grid(&images, layout(columns.clamp(1, KEPT) as u32))?))
    }
}
