"""Classical density estimators: fitted in closed form, and what every deep model has to beat."""

from trilemma.classical.gmm import GMM
from trilemma.classical.histogram import Histogram
from trilemma.classical.independent import Independent
from trilemma.classical.kde import KDE
from trilemma.core.registry import register

__all__ = ["GMM", "KDE", "Histogram", "Independent"]

register("independent", Independent, family="classical", paper="Laplace 1774, Mém. Acad. R. Sci. Paris 6")
register("histogram", Histogram, family="classical", paper="Chow & Liu 1968, IEEE Trans. Inf. Theory 14")
register("kde", KDE, family="classical", paper="Parzen 1962, Ann. Math. Statist. 33")
register("gmm", GMM, family="classical", paper="Dempster, Laird & Rubin 1977, J. R. Statist. Soc. B 39")
