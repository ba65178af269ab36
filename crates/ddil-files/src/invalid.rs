use std::fmt::Display;

/// A setting with a value that is not allowed: which setting, what was found, and what is expected.
///
/// Every crate of the workspace reports a setting that is out of range with this type; the `invalid` method of each
/// crate's error returns it.
///
/// # Example
///
/// ```
/// use ddil_files::Invalid;
///
/// let invalid = Invalid::new("eta", 1.5, "in 0..=1");
/// assert_eq!(invalid.to_string(), "`eta` is 1.5; expected in 0..=1");
/// assert_eq!(invalid.under("sampler").field, "sampler.eta");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is {value}; expected {expected}")]
#[non_exhaustive]
pub struct Invalid {
    /// The setting, as a config file spells it: keys joined by dots, several settings by a comma.
    pub field: String,
    /// The value that was found.
    pub value: String,
    /// The values that are allowed.
    pub expected: String,
}

impl Invalid {
    /// The error of `field` with the value `value`, where `expected` is allowed.
    pub fn new(field: impl Into<String>, value: impl Display, expected: impl Into<String>) -> Self {
        Self { field: field.into(), value: value.to_string(), expected: expected.into() }
    }

    /// The same error with the setting inside the table `table`; each of several settings is prefixed.
    #[must_use]
    pub fn under(self, table: &str) -> Self {
        let fields: Vec<String> =
            self.field.split(", ").map(|field| format!("{table}.{field}")).collect();
        Self { field: fields.join(", "), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_settings_are_prefixed_one_by_one() {
        let invalid = Invalid::new("beta_start, beta_end", "2, 1", "in order").under("schedule");
        assert_eq!(invalid.field, "schedule.beta_start, schedule.beta_end");
    }
}
