"""What tests of the page ask a browser."""

from collections.abc import Callable
from typing import Any


def wait(driver: Any, holds: Callable[[Any], Any]) -> Any:
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(
        driver,
        60,
        poll_frequency=0.05,
        ignored_exceptions=(NoSuchElementException, StaleElementReferenceException),
    ).until(holds)


def settled(driver: Any) -> bool:
    return bool(
        driver.execute_script(
            "return !document.querySelector('.busy') &&"
            " document.querySelectorAll('.card').length > 0"
        )
    )


def focus(driver: Any) -> str:
    return str(
        driver.execute_script(
            "return document.activeElement.id || document.activeElement.className"
        )
    )


def keys(driver: Any, *pressed: str) -> None:
    driver.switch_to.active_element.send_keys(*pressed)


def text_of(driver: Any, selector: str) -> str:
    return str(
        driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)
    )
