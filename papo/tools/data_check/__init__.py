"""`papo data check`: what is wrong with files of prompts, before a run reads them."""
