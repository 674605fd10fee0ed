"""Gaussian data, for which the denoiser and the probability-flow ODE have closed forms."""

from lcm.core.denoiser import Denoised, Denoiser
from lcm.core.process import Flow


class Gaussian:
    """z0 ~ N(mu, s^2) in each element; s = 0 is a point mass."""

    def __init__(self, process, mu=0.3, s=0.5):
        self.process, self.mu, self.s = process, mu, s

    def moments(self, t):
        """Return mean and standard deviation of z_t."""
        alpha, sigma = self.process.at(t, 4)
        return alpha * self.mu, (alpha**2 * self.s**2 + sigma**2).sqrt()

    def denoise(self, z, t):
        """Return E[x0 | z_t] and E[eps | z_t]."""
        (alpha, sigma), (mean, std) = self.process.at(t, 4), self.moments(t)
        scaled = (z - mean) / (std**2).clamp_min(1e-30)  # a point mass in a flow ends with std = 0
        return Denoised(self.mu + alpha * self.s**2 * scaled, sigma * scaled)

    def flow(self, z, t, s):
        """Return the exact solution of the ODE from z at t to s."""
        (mean_t, std_t), (mean_s, std_s) = self.moments(t), self.moments(s)
        return mean_s + (z - mean_t) * std_s / std_t

    def end(self, z, t):
        """Return (x0, eps) of z for a perfect consistency function: x0 is the clean end of the trajectory."""
        x0, (alpha, sigma) = self.flow(z, t, t * 0 + self.process.t_min), self.process.at(t, 4)
        return Denoised(x0, (z - alpha * x0) / sigma.clamp_min(1e-30))


def timestep(process, time):
    """Return the timestep of a network's input `time`."""
    if not isinstance(process, Flow):
        return time
    q = time / 1000
    return q / (process.shift - (process.shift - 1) * q) * process.num_timesteps - 1


def network(process, prediction_type, denoise):
    """Return a denoiser whose network predicts the (x0, eps) of `denoise(z, t)`."""

    def net(z, time, cond, w=None):
        t = timestep(process, time)
        return denoiser.target(*denoise(z, t), t)

    denoiser = Denoiser(net, process, prediction_type)
    return denoiser


def exact(process, prediction_type="epsilon", **data):
    """Return the perfect denoiser of Gaussian data."""
    return network(process, prediction_type, Gaussian(process, **data).denoise)
