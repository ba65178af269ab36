//! Whether samples show their class, and how those of classes that the data lack compare.

use std::collections::BTreeSet;

use ddil_files::Invalid;
use ddil_metrics::{FeatureExtractor, Reference, Statistics, frechet_distance};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// The label of a sample of a model with this many classes: classes alternate.
pub(crate) fn label_of(sample: i64, num_classes: i64) -> i64 {
    sample % num_classes
}

/// Samples of the classes that the training data of a student lack, although its teacher knows them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MissingClasses {
    /// Names of the classes, in the order of their labels.
    pub classes: Vec<String>,
    /// The number of samples of these classes.
    pub samples: u64,
    /// Share of these samples that the classifier assigns to their class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_agreement: Option<f64>,
    /// Fréchet distance of these samples to the teacher's samples of the same classes; none with fewer than two on either
    /// side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frechet_to_teacher: Option<f64>,
}

/// Features of samples whose classes alternate: sample `i` is of class `i % num_classes`.
///
/// # Example
///
/// ```
/// use ddil_evaluate::SamplesOfClasses;
/// use ddil_metrics::{FASHION_CLASSES, FashionClassifier, FeatureExtractor};
/// # use tch::{Device, Tensor, kind::FLOAT_CPU};
/// let classifier = FashionClassifier::pretrained(Device::Cpu)?;
/// let features = classifier.features(&Tensor::zeros([20, 1, 32, 32], FLOAT_CPU))?;
/// let class_names = FASHION_CLASSES.map(str::to_owned);
/// let samples = SamplesOfClasses::new(&features, &class_names)?;
/// // All images are the same, so that one in ten is of the predicted class.
/// assert_eq!(samples.agreement(&classifier)?, Some(0.1));
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SamplesOfClasses<'a> {
    features: &'a Tensor,
    class_names: &'a [String],
}

impl<'a> SamplesOfClasses<'a> {
    /// `features`: `[n, dim]`, in the order of the samples; `class_names`: those of the model, by label.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] without classes, or for features that are not `[n, dim]`.
    pub fn new(features: &'a Tensor, class_names: &'a [String]) -> Result<Self> {
        if class_names.is_empty() {
            return Err(Invalid::new("class_names", "empty", "one class or more").into());
        }
        if features.dim() != 2 {
            let found = format!("{:?}", features.size());
            return Err(Invalid::new("features", found, "[n, dim]").into());
        }
        Ok(Self { features, class_names })
    }

    /// The share of samples that the extractor's classifier assigns to their class; none without samples, if
    /// it has no classifier, or one of other classes than the model's.
    ///
    /// # Errors
    ///
    /// Errors of the classifier: features of another extractor.
    pub fn agreement(&self, extractor: &dyn FeatureExtractor) -> Result<Option<f64>> {
        let all: Vec<usize> = (0..self.class_names.len()).collect();
        self.agreement_of(&all, self.features, extractor)
    }

    /// The metrics of the samples of some classes alone.
    ///
    /// The Fréchet distance requires `teacher`, samples of a model with the same classes in the same order, its
    /// features, and at least two samples of these classes on both sides: a covariance requires two.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a label beyond the classes; errors of the metrics: features that are NaN or infinite.
    pub fn of_missing(
        &self,
        labels: &[usize],
        teacher: Option<&Reference>,
        extractor: &dyn FeatureExtractor,
    ) -> Result<MissingClasses> {
        let labels: BTreeSet<usize> = labels.iter().copied().collect();
        let labels = &Vec::from_iter(labels);
        let features = self.rows_of(labels, self.features)?;
        let teacher = teacher.and_then(Reference::features);
        let teacher = teacher.map(|all| self.rows_of(labels, all)).transpose()?;
        let is_enough = |rows: &Tensor| rows.size()[0] > 1;
        let teacher = teacher.filter(|teacher| is_enough(teacher) && is_enough(&features));
        let frechet_to_teacher = teacher.map(|teacher| {
            let of = Statistics::from_features;
            frechet_distance(&of(&teacher)?, &of(&features)?)
        });
        Ok(MissingClasses {
            classes: labels.iter().map(|&label| self.class_names[label].clone()).collect(),
            samples: features.size()[0].unsigned_abs(),
            class_agreement: self.agreement_of(labels, &features, extractor)?,
            frechet_to_teacher: frechet_to_teacher.transpose()?,
        })
    }

    /// The rows of samples of some classes, in the order of the samples.
    fn rows_of(&self, labels: &[usize], features: &Tensor) -> Result<Tensor> {
        let count = self.class_names.len();
        if let Some(label) = labels.iter().find(|&&label| label >= count) {
            return Err(Invalid::new("labels", label, format!("less than {count}")).into());
        }
        let rows: Vec<i64> = (0..features.size()[0])
            .filter(|&row| labels.contains(&(label_of(row, count as i64) as usize)))
            .collect();
        let rows = Tensor::from_slice(&rows).to_device(features.device());
        features.f_index_select(0, &rows).map_err(Error::torch("SamplesOfClasses::of_missing"))
    }

    /// `features` are those of the samples of the classes `labels`, ascending, which alternate.
    fn agreement_of(
        &self,
        labels: &[usize],
        features: &Tensor,
        extractor: &dyn FeatureExtractor,
    ) -> Result<Option<f64>> {
        let Some(predictor) = extractor.class_predictor() else { return Ok(None) };
        let known = predictor.class_names();
        let label_of_class = |&label: &usize| {
            known.iter().position(|name| *name == self.class_names[label]).map(|own| own as i64)
        };
        let Some(wanted) = labels.iter().map(label_of_class).collect::<Option<Vec<i64>>>() else {
            return Ok(None);
        };
        let n = features.size()[0];
        if n == 0 {
            return Ok(None);
        }
        let wanted: Vec<i64> = wanted.into_iter().cycle().take(n as usize).collect();
        let predicted = predictor.predict(features)?;
        let wanted = Tensor::from_slice(&wanted).to_device(predicted.device());
        let hits = predicted.f_eq_tensor(&wanted).and_then(|hits| hits.f_to_kind(Kind::Double));
        let share = hits.and_then(|hits| hits.f_mean(Kind::Double));
        Ok(Some(share.map_err(Error::torch("SamplesOfClasses::agreement"))?.double_value(&[])))
    }
}
