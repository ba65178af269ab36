//! Dataset samples, noised.

use super::{SourceRequest, TrajectorySource};
use crate::error::Result;
use crate::rows::on_device;
use crate::states::{Source, States};

/// The forward process: `x_t = alpha_t x0 + sigma_t noise`, the states of plain distillation.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForwardSource;

impl TrajectorySource for ForwardSource {
    fn states(&mut self, request: &SourceRequest<'_>) -> Result<States> {
        let _no_grad = tch::no_grad_guard();
        request.ensure()?;
        let x0 = &request.data.x0;
        let timesteps = on_device(&request.timesteps(), x0.device());
        let x_t = request.sampler.schedule().add_noise(x0, request.noise, &timesteps)?;
        let conditioning = request.data.conditioning.shallow_clone();
        Ok(request.made(x_t, conditioning, vec![Source::Forward; request.len()]))
    }
}
