# The program for a CPU, built without a network from wheels that were collected beforehand
# (docs/container.md). It runs as a user that owns nothing; data is mounted at /data.
FROM python:3.11-slim
RUN --mount=type=bind,source=wheels,target=/wheels \
    python -m pip install --no-cache-dir --no-index --find-links /wheels "rfmedsam2-jax[dicom,serve]"
RUN useradd --create-home --uid 1000 person
USER person
# Installed models and fetched weights; mount a volume here to keep them.
ENV RFMEDSAM2_HOME=/home/person/rfmedsam2
WORKDIR /data
EXPOSE 8765
ENTRYPOINT ["rfmedsam2"]
CMD ["--help"]
