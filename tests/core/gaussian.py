"""Gaussian data, the one case where denoiser and probability-flow ODE are closed forms."""

from lcm.core.prediction import Denoised


class Gaussian:
    """z0 ~ N(mu, s^2) in each element; s = 0 is a point mass."""

    def __init__(self, schedule, mu=0.3, s=0.5):
        self.schedule, self.mu, self.s = schedule, mu, s

    def moments(self, t):
        """Mean and standard deviation of z_t."""
        alpha, sigma = self.schedule.at(t, 4)
        return alpha * self.mu, (alpha**2 * self.s**2 + sigma**2).sqrt()

    def denoise(self, z, t):
        """E[x0 | z_t] and the eps that belongs to it."""
        (alpha, sigma), (mean, std) = self.schedule.at(t, 4), self.moments(t)
        x0 = self.mu + alpha * self.s**2 / std**2 * (z - mean)
        return Denoised(x0, (z - alpha * x0) / sigma)

    def flow(self, z, t, s):
        """The exact solution of the ODE from z at t to s."""
        (mean_t, std_t), (mean_s, std_s) = self.moments(t), self.moments(s)
        return mean_s + (z - mean_t) * std_s / std_t
