"""Files of the search page: plain HTML, CSS and JavaScript, no build step."""
